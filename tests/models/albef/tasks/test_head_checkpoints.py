"""Fine-tuned ALBEF models from pretrained weights and from the authors' fine-tuned files."""

import pytest
import torch
from fastvlp_tests.albef_head_cases import LENGTHS, disturb, fresh, make_images, sentences

from fastvlp.models import albef
from fastvlp.models.albef.tasks import classification as albef_classifier
from fastvlp.models.albef.tasks import vqa as albef_vqa
from fastvlp.models.checkpoints.albef_heads import load_finetuned, start_from


def pretrained(**overrides):
    return disturb(fresh(albef.create, pretraining=False, **overrides)).eval()


def theirs(model):
    """The state dict of an authors' fine-tuned checkpoint."""
    state = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, torch.Tensor) or name.endswith("_extra_state"):
            continue
        mark = "_m" if name.startswith("momentum.module.") else ""
        name = name.removeprefix("momentum.module.").removeprefix("student.")
        part, _, rest = name.partition(".")
        rest = rest.removeprefix("bert.") if part == "text_encoder" else rest
        state[f"{part}{mark}.{rest}"] = value.clone()
    state["text_encoder.embeddings.position_ids"] = torch.arange(64)[None]
    return {"model": state}


def one_image(model):
    return model.student.encode_first(
        make_images(4),
        albef_classifier.Texts.make(model.config, sentences(4, 9), LENGTHS, "cpu"),
        False,
    )


@torch.no_grad()
def test_entailment_starts_from_pretraining():
    source, model = pretrained(), fresh(albef_classifier.entailment).eval()
    report = start_from(model, source)
    assert set(report.missing) == {f"cls_head.{i}.{n}" for i in (0, 2) for n in ("weight", "bias")}
    texts = albef_classifier.Texts.make(model.config, sentences(4, 9), LENGTHS, "cpu")
    wanted = source.student.fuse_padded(
        source.student.encode_padded(texts.ids, texts.mask),
        texts.mask,
        source.student.encode_image(make_images(4)),
    )[:, 0]
    torch.testing.assert_close(one_image(model), wanted, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(
        model.student.state_dict().values(), model.teacher.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_both_copies_of_a_fusion_layer_start_alike_and_go_on_to_nlvr2():
    source, middle = pretrained(), fresh(albef_classifier.text_assignment)
    start_from(middle, source)
    assert torch.equal(middle.vision_proj.weight, source.student.vision_proj.weight)
    layers = middle.student.text_encoder.fusion
    for i, layer in enumerate(layers):
        wanted = source.student.text_encoder.fusion[i // 2].state_dict()
        assert all(torch.equal(v, wanted[k]) for k, v in layer.state_dict().items())
    disturb(middle)
    model = fresh(albef_classifier.nlvr2)
    start_from(model, middle)
    for ours, before in zip(model.student.text_encoder.fusion, layers, strict=True):
        wanted = before.state_dict()
        assert all(torch.equal(v, wanted[k]) for k, v in ours.state_dict().items())


def test_the_decoder_starts_from_pretraining_with_the_vocabulary_head():
    source, model = pretrained(), fresh(albef_vqa.create)
    assert start_from(model, source).missing == ()
    encoder, decoder = source.student.text_encoder, model.student.text_decoder
    wanted = encoder.predictions.state_dict()
    assert all(torch.equal(v, wanted[k]) for k, v in decoder.predictions.state_dict().items())
    for ours, before in zip(decoder.bert["encoder"]["layer"], encoder.fusion, strict=True):
        wanted = before.state_dict()
        assert all(torch.equal(v, wanted[k]) for k, v in ours.state_dict().items())
    narrow = fresh(albef_vqa.create, vision_width=32)
    report = start_from(narrow, pretrained(vision_width=32))
    assert len(report.missing) == 4 and "differ in width" in str(report)


def test_positions_are_resized():
    model = fresh(albef_classifier.entailment, image_size=96)
    report = start_from(model, pretrained())
    assert report.reshaped == (("visual_encoder.pos_embed", (1, 17, 64), (1, 37, 64)),)


MAKE = [albef_vqa.create, albef_classifier.entailment, albef_classifier.nlvr2]


@pytest.mark.parametrize("make", MAKE)
def test_fine_tuned_files_of_the_authors(make):
    source, model = disturb(fresh(make)), fresh(make)
    state = theirs(source)
    load_finetuned(model, state)
    wanted = source.state_dict()
    tensors = {k: v for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    assert all(torch.equal(v, wanted[k]) for k, v in tensors.items())
    # Without a momentum encoder in the file it takes the model's weights.
    student = {k: v for k, v in state["model"].items() if "_m." not in k}
    load_finetuned(model, student)
    assert torch.equal(
        model.teacher.visual_encoder.pos_embed, source.student.visual_encoder.pos_embed
    )
    without = fresh(make, distill=False)
    load_finetuned(without, state)
    assert torch.equal(
        without.student.visual_encoder.pos_embed, wanted["student.visual_encoder.pos_embed"]
    )


def test_what_does_not_fit_is_refused():
    state = theirs(disturb(fresh(albef_classifier.entailment)))["model"]
    del state["cls_head.0.weight"]
    model = fresh(albef_classifier.entailment)
    before = {k: v.clone() for k, v in model.student.state_dict().items()}
    with pytest.raises(ValueError, match="cls_head.0.weight"):
        load_finetuned(model, state)
    assert all(torch.equal(before[k], v) for k, v in model.student.state_dict().items())
