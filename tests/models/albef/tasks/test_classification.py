"""ALBEF's entailment, NLVR2 and text-assignment models."""

import pytest
import torch
import torch.nn.functional as F
from fastvlp_tests.albef_head_cases import (
    LENGTHS,
    assert_forms_agree,
    assert_saved_and_loaded,
    disturb,
    fresh,
    make_images,
    sentences,
    with_gradients,
)
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertLayer

from fastvlp.models.albef.tasks import classification as albef_classifier
from fastvlp.ops.packing import TextLayout

MAKE = {"entailment": albef_classifier.entailment, "nlvr2": albef_classifier.nlvr2}
LABELS = torch.tensor([0, 1, 1, 0])


def make(task, **overrides):
    return disturb(fresh(MAKE[task], **overrides))


def batch(task):
    images = make_images(4) if task == "entailment" else make_images(4, 2)
    return images, sentences(4, 9), LENGTHS


@pytest.mark.parametrize(
    "task, distill", [("entailment", True), ("entailment", False), ("nlvr2", True)]
)
def test_forms_agree(task, distill):
    images, *texts = batch(task)

    def loss(images):
        return lambda model: model.loss(images, *texts, LABELS, 0.3, update=False)

    assert_forms_agree(make(task, distill=distill), loss(images), loss(images.double()))


def test_forms_of_text_assignment_agree():
    model = disturb(fresh(albef_classifier.text_assignment))
    images, texts = make_images(7), (sentences(7, 9), [9, 4, 6, 5, 1, 3, 8])

    def loss(images):
        return lambda model: model.loss(images, *texts, seed=5)

    assert_forms_agree(model, loss(images), loss(images.double()))


@pytest.mark.parametrize("task", MAKE)
def test_distillation_is_the_mean_of_two_targets(task):
    model, given = make(task).eval(), batch(task)
    with torch.no_grad():
        ours = model.logits(*given)
        alone = model.loss(*given, LABELS, 0.0, update=False)
        both = model.loss(*given, LABELS, 0.3, update=False)
        texts = model._texts(*given)
        taught = model.teacher(given[0], texts, False).softmax(-1)
    torch.testing.assert_close(alone, F.cross_entropy(ours, LABELS))
    soft = -(taught * ours.log_softmax(-1)).sum(1).mean()
    torch.testing.assert_close(both, 0.7 * alone + 0.3 * soft)


def test_the_momentum_encoder_moves_before_it_teaches():
    model, given = make("entailment"), batch("entailment")
    head = model.momentum.module.cls_head[0].weight
    moved = head.lerp(model.student.cls_head[0].weight, 1 - model.config.momentum).detach()
    model.loss(*given, LABELS, momentum_updated=True)
    assert model.momentum.num_updates == 0
    first = model.loss(*given, LABELS)
    torch.testing.assert_close(head, moved)
    assert torch.equal(first, model.loss(*given, LABELS, update=False))


def test_two_images_share_keys_and_values_and_nothing_else():
    model = make("nlvr2")
    for towers in (model.student, model.teacher):
        layers = towers.text_encoder.fusion
        assert len(layers) == 2 * model.config.fusion_layers
        for first, second in zip(layers[::2], layers[1::2], strict=True):
            ours, theirs = (dict(layer.named_parameters()) for layer in (first, second))
            shared = {n for n in ours if ours[n] is theirs[n]}
            assert shared == {
                f"crossattention.self.{p}.{q}" for p in ("key", "value") for q in ("weight", "bias")
            }
    assert not any(a is b for a in model.student.parameters() for b in model.teacher.parameters())


def test_an_image_is_projected_once_for_both_layers():
    model, given = make("nlvr2", distill=False), batch("nlvr2")
    rows = []
    for layer in model.student.text_encoder.fusion[::2]:
        layer.crossattention.self.key.register_forward_hook(
            lambda _, arguments, __: rows.append(arguments[0].shape[0])
        )
    model.loss(*given, LABELS)
    assert rows == [8] * model.config.fusion_layers


def bert_layers(ours, cross):
    config = BertConfig(
        hidden_size=64,
        num_attention_heads=2,
        intermediate_size=256,
        is_decoder=cross,
        add_cross_attention=cross,
        attn_implementation="eager",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    for layer in ours:
        theirs = BertLayer(config)
        theirs.load_state_dict(layer.state_dict())
        yield theirs.eval()


@torch.no_grad()
def test_two_images_agree_with_layers_of_transformers():
    """Layer after layer, the even ones of fusion with the first image, the odd with the second."""
    model, (images, ids, lengths) = make("nlvr2").eval(), batch("nlvr2")
    encoder = model.student.text_encoder
    tokens = model.student.encode_image(images.flatten(0, 1)).unflatten(0, (4, 2))
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    hidden = (~mask[:, None, None]) * torch.finfo(torch.float32).min
    x = encoder.embeddings(ids)
    for layer in bert_layers(encoder.text, cross=False):
        x = layer(x, hidden)
    for i, layer in enumerate(bert_layers(encoder.fusion, cross=True)):
        x = layer(x, hidden, encoder_hidden_states=tokens[:, i % 2])
    wanted = model.student.cls_head(x[:, 0])
    torch.testing.assert_close(model.logits(images, ids, lengths), wanted, rtol=1e-5, atol=1e-6)


def test_sampled_assignments():
    model = fresh(albef_classifier.text_assignment)
    tokens = torch.randn(300, 2, 64)
    tokens[1] = tokens[0]
    images, labels = model.sample(tokens, seed=1)
    own = torch.arange(300)
    assert torch.equal(images[labels == 0, 0], own[labels == 0])
    assert torch.equal(images[labels == 1, 1], own[labels == 1])
    assert (images[:, 0] != images[:, 1]).all()
    assert (images == own[:, None]).sum() == (labels < 2).sum()
    assert all(70 < (labels == i).sum() < 130 for i in range(3))
    assert torch.equal(images, model.sample(tokens, seed=1).images)
    # The momentum encoder of an image is by far the likeliest other one.
    sampled = [model.sample(tokens[:40], seed=i).images[0] for i in range(20)]
    assert sum(1 in pair.tolist() for pair in sampled) > 10
    state = torch.get_rng_state()
    model.sample(tokens, seed=1)
    assert torch.equal(state, torch.get_rng_state())


def test_text_assignment_leaves_its_projection_alone():
    model = disturb(fresh(albef_classifier.text_assignment))
    found = with_gradients(
        model, lambda m: m.loss(make_images(4), sentences(4, 9), LENGTHS, seed=1)
    )
    assert not any(name.startswith("vision_proj") for name in found)


@pytest.mark.parametrize("task", MAKE)
def test_save_and_load(tmp_path, task):
    given = batch(task)
    assert_saved_and_loaded(
        make(task),
        tmp_path,
        albef_classifier.load,
        lambda model: model.loss(*given, LABELS, update=False).detach(),
    )


@pytest.mark.parametrize(
    "task, change, message",
    [
        ("entailment", dict(images=make_images(3)), "text_ids: expected one text"),
        ("entailment", dict(images=make_images(4, 2)), "images: expected"),
        ("nlvr2", dict(images=make_images(4)), r"images: expected \[n, 2, 3"),
        ("entailment", dict(labels=LABELS[:3]), r"labels: expected int64 \[4\]"),
        ("entailment", dict(alpha=2.0), "alpha: expected 0 to 1"),
        ("entailment", dict(text_mask=[9, 4]), "text_mask: expected"),
    ],
)
def test_bad_input_leaves_the_momentum_encoder(task, change, message):
    model = make(task)
    names = ("images", "text_ids", "text_mask", "labels")
    given = dict(zip(names, (*batch(task), LABELS), strict=True)) | change
    with pytest.raises((TypeError, ValueError), match=message):
        model.loss(**given)
    assert model.momentum.num_updates == 0


def test_faults_of_sizes_and_of_small_batches():
    with pytest.raises(ValueError, match="images: expected 1 or 2"):
        albef_classifier.entailment("tiny", images=3)
    with pytest.raises(ValueError, match="classes: expected a whole number"):
        albef_classifier.nlvr2("tiny", classes=0)
    with pytest.raises(ValueError, match="name: expected one of"):
        albef_classifier.entailment("huge")
    model = albef_classifier.text_assignment("tiny")
    with pytest.raises(ValueError, match="images: expected 3 or more"):
        model.loss(make_images(2), sentences(2, 9), [9, 4])


def test_a_text_layout_of_one_token():
    """Texts of [CLS] alone."""
    model = make("nlvr2", distill=False)
    images, ids = make_images(2, 2), sentences(2, 3)
    assert TextLayout.from_lengths([1, 1], 3).total == 2
    found = model.logits(images, ids, [1, 1])
    torch.testing.assert_close(found, model.use_reference().logits(images, ids, [1, 1]))
