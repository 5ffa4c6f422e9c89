"""GradCAM on ALBEF's cross-attention against autograd on plain attention; scores of boxes."""

import pytest
import torch
import torch.nn.functional as F
from fastvlp_tests.albef_head_cases import disturb, fresh, make_images, sentences
from fastvlp_tests.tolerance import assert_as_accurate, epsilon

from fastvlp.models import albef
from fastvlp.models.albef.tasks.grounding import LAYER, box_scores, grounding_maps

LENGTHS, OWNER = [9, 4, 1, 5], [1, 0, 1, 2]


def make():
    return disturb(fresh(albef.create, pretraining=False, fusion_layers=3)).eval()


def plain_maps(model, images, layer):
    """Maps and matching probabilities: attention written out for each text alone, its weights a
    leaf of the graph."""
    student, maps, matches = model.student, [], []
    ids, (at, fusion) = sentences(4, 9), (layer - 2, student.text_encoder.fusion)
    for text, length, image in zip(ids, LENGTHS, OWNER, strict=True):
        mask = torch.ones(1, length, dtype=torch.bool)
        with torch.no_grad():
            tokens = student.encode_image(images[image : image + 1])
            x = student.encode_padded(text[None, :length], mask)
            for each in fusion[:at]:
                x = each.padded(x, mask, tokens)
            chosen = fusion[at]
            heads, _ = chosen._attend(chosen.attention.self, x, x, None)
            x = chosen.attention.output(heads, x)
            project = chosen.crossattention.self
            q, k, v = (
                t.unflatten(-1, (2, 32)).transpose(1, 2)
                for t in (project.query(x), project.key(tokens), project.value(tokens))
            )
            probs = (q @ k.transpose(-1, -2) / 32**0.5).softmax(-1)
        probs.requires_grad_()
        y = chosen.crossattention.output((probs @ v).transpose(1, 2).flatten(-2), x)
        y = chosen.output(F.gelu(chosen.intermediate["dense"](y)), y)
        for each in fusion[at + 1 :]:
            y = each.padded(y, mask, tokens)
        logits = model.itm_head(y[:, 0])[0]
        (gradient,) = torch.autograd.grad(logits[1], probs)
        matches.append(logits.detach().softmax(0)[1])
        cam = (probs.detach() * gradient.clamp(min=0))[0, :, :, 1:]
        maps.append(cam.mean((0, 1)).view(4, 4))
    return torch.stack(maps), torch.stack(matches)


@pytest.mark.parametrize("layer", [2, 3, 4])
def test_maps_agree_with_autograd_on_plain_attention(layer):
    model, images = make(), make_images(3)
    eager = plain_maps(model, images, layer)
    arguments = sentences(4, 9), LENGTHS, OWNER
    ours = [
        grounding_maps(
            model.use_reference(plain), images, *arguments, layer=layer, return_match=True
        )
        for plain in (False, True)
    ]
    exact = plain_maps(model.double(), images.double(), layer)
    assert (exact[0].flatten(1).sum(1) > 0).all()
    for found in ours:
        for name, *results in zip(("maps", "matches"), found, eager, exact, strict=True):
            floor = epsilon(torch.float32) * results[-1].norm()
            assert_as_accurate(name, *results, floor)


def test_gradients_and_frozen_parameters_are_left_alone():
    model, given = make(), (make_images(3), sentences(4, 9), LENGTHS, OWNER)
    found = grounding_maps(model, *given, layer=3)
    assert not found.requires_grad and all(p.grad is None for p in model.parameters())
    model.requires_grad_(False)
    with torch.no_grad():
        assert torch.equal(grounding_maps(model, *given, layer=3), found)


def test_the_third_fusion_layer_is_the_usual_one():
    config = albef.CONFIGS["base"]
    assert LAYER - config.text_layers == 2


def test_box_scores():
    torch.manual_seed(0)
    heat = torch.rand(4, 4)
    boxes = torch.tensor([[0, 0, 30, 20], [5, 3, 1, 1], [25, 10, 10, 40]])
    found = box_scores(heat, boxes, (24, 30))
    large = F.interpolate(heat[None, None].double(), size=(24, 30), mode="bicubic")[0, 0]
    # The last box leaves the image; its whole area counts.
    wanted = [
        large[:20].sum() / 600**0.5,
        large[3, 5],
        large[10:, 25:].sum() / 400**0.5,
    ]
    torch.testing.assert_close(found, torch.stack(wanted))
    squared = box_scores(heat, boxes, (24, 30), power=1.0)
    torch.testing.assert_close(squared[0], large[:20].mean())


def test_faults():
    model, given = make(), (make_images(3), sentences(4, 9), LENGTHS)
    for arguments, layer, message in (
        ((*given, OWNER), 1, "layer: expected a fusion layer, 2 to 4"),
        ((*given, OWNER), 5, "layer: expected a fusion layer, 2 to 4"),
        ((*given, [0, 1, 2, 3]), 3, "image_of_text: expected 0 to 2"),
        (given, 3, "image_of_text: expected 0 to 2"),
    ):
        with pytest.raises(ValueError, match=message):
            grounding_maps(model, *arguments, layer=layer)
    with pytest.raises(RuntimeError, match="evaluation mode"):
        grounding_maps(model.train(), *given, OWNER, layer=3)
    with pytest.raises(ValueError, match="boxes: expected"):
        box_scores(torch.rand(4, 4), torch.tensor([[0, 0, 0, 3]]), (24, 30))
    with pytest.raises(ValueError, match="heat: expected"):
        box_scores(torch.rand(1, 4, 4), torch.tensor([[0, 0, 2, 3]]), (24, 30))
