"""ViLT's packed form, its objectives and their gradients."""

import dataclasses
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from fastvlp_tests.tolerance import assert_as_accurate, epsilon
from fastvlp_tests.vilt_cases import (
    FALSE_SIZES,
    LENGTHS,
    PATCH,
    SIZES,
    images,
    labels,
    mask_of,
    small,
    tokens,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlp.models import vilt
from fastvlp.models.layers import vit
from fastvlp.models.vilt import heads as vilt_heads
from fastvlp.models.vilt.heads import draw_matches, vqa_targets
from fastvlp.models.vilt.patches import ImageBatch

ALL = ("mlm", "itm", "vqa", "nlvr2", "retrieval", "tokens")
MATCHES = (True, False, False, True)


def pretraining(model, dtype=torch.float32, **options):
    return model.pretraining_losses(
        tokens(), LENGTHS, tokens(seed=4), labels(), images(dtype=dtype),
        images(FALSE_SIZES, seed=5, dtype=dtype), **{"matches": MATCHES, **options},
    )  # fmt: skip


def every_loss(model, dtype=torch.float32):
    """The sum of the losses of all tasks."""
    first, second = images(dtype=dtype), images(FALSE_SIZES, seed=6, dtype=dtype)
    embedded = model.embed_images(first)
    sequences = model.encode(tokens(), embedded, LENGTHS)
    targets = torch.linspace(0, 1, 4 * model.config.answers).view(4, -1)
    order = torch.stack([torch.arange(4).roll(-i) for i in range(4)])
    words = model.token_logits(sequences)[1, : LENGTHS[1]]
    words = words if words.dtype == torch.float64 else words.float()
    return (
        pretraining(model, dtype)["loss"]
        + model.vqa_loss(model.vqa_logits(sequences), targets)
        + model.nlvr2_loss(
            model.nlvr2_logits(tokens(), LENGTHS, embedded, model.embed_images(second)),
            torch.tensor([1, 0, 0, 1]),
        )
        + model.retrieval_loss(tokens()[order], torch.tensor(LENGTHS)[order], embedded)
        + F.cross_entropy(words, torch.tensor([1, 3, 0]))
        # The loss of retrieval has no gradient with respect to the bias, which all texts share.
        + model.rank_scores(sequences).square().mean()
    )


def gradients(model, dtype=torch.float32):
    model.zero_grad()
    loss = every_loss(model, dtype)
    loss.backward()
    return loss.detach().double(), {k: p.grad.double() for k, p in model.named_parameters()}


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_every_gradient_is_as_accurate_as_the_padded_one(autocast):
    model = small(tasks=ALL)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, got = gradients(model)
        model.use_reference()
        plain_loss, plain = gradients(model)
    exact_loss, exact = gradients(model.double(), torch.float64)
    unit = epsilon(torch.bfloat16 if autocast else torch.float32)
    assert_as_accurate("loss", loss, plain_loss, exact_loss, floor=unit * exact_loss.abs().item())
    assert got.keys() == exact.keys()
    for name, value in exact.items():
        assert value.norm() > 0, name
        # The gradient with respect to a classifier's bias is a difference of probabilities, rounded
        # at 1.
        size = value.norm().item() + name.endswith("classifier.3.bias")
        assert_as_accurate(name, got[name], plain[name], value, floor=unit * size)


@given(
    sizes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=4),
    data=st.data(),
)
@settings(max_examples=25)
@torch.no_grad()
def test_packed_equals_padded(sizes, data):
    n = len(sizes)
    lengths = data.draw(st.lists(st.integers(1, 12), min_size=n, max_size=n))
    cap = data.draw(st.sampled_from([-1, 1, 4, 9]))
    model = small(layers=1).double()
    batch, ids = images(sizes, dtype=torch.float64), tokens(lengths, padded=12)
    results = []
    for reference in (False, True):
        model.use_reference(reference)
        embedded = model.embed_images(batch, max_image_len=cap, seed=3)
        sequences = model.encode(ids, embedded, lengths).map(model.transformer.norm)
        results.append((sequences.text(), sequences.image(), model.pool(sequences)))
    for packed, padded in zip(*results, strict=True):
        torch.testing.assert_close(packed, padded, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("reference", [False, True])
def test_padding_has_no_influence(reference):
    """NaN pixels, other ids behind the texts and a larger canvas change no bit."""
    model = small(tasks=ALL).use_reference(reference)

    def run(batch, ids, mask):
        model.zero_grad()
        embedded = model.embed_images(batch)
        sequences = model.encode(ids, embedded, mask)
        losses = model.matching_losses(sequences, torch.tensor(MATCHES))
        loss = sum(losses.values()) + model.mlm_loss(sequences, labels())
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    batch, ids = images(), tokens()
    outside, behind = ~mask_of(batch), torch.arange(10) >= torch.tensor(LENGTHS)[:, None]
    spoilt = F.pad(batch.images.masked_fill(outside[:, None], torch.nan), (0, PATCH, 0, 2 * PATCH))
    spoilt[:, :, 4 * PATCH :], spoilt[:, :, :, 5 * PATCH :] = torch.nan, torch.inf
    loss, grads = run(batch, ids, LENGTHS)
    other, others = run(
        ImageBatch(spoilt, sizes=batch.sizes), ids.masked_fill(behind, 59), (~behind).int()
    )
    assert torch.equal(loss, other)
    assert all(map(torch.equal, grads, others))


@pytest.mark.parametrize("reference", [False, True])
@torch.no_grad()
def test_a_sample_does_not_depend_on_the_batch(reference):
    model = small().double().use_reference(reference)
    batch = images(dtype=torch.float64)._replace(sample_index=[30, 10, 20, 40])
    embedded = model.embed_images(batch, max_image_len=6, seed=8)
    pooled = model.pool(model.encode(tokens(), embedded, LENGTHS))
    for i in range(len(LENGTHS)):
        (height, width), one = SIZES[i], slice(i, i + 1)
        alone = ImageBatch(
            batch.images[one, :, : height * PATCH, : width * PATCH],
            sample_index=batch.sample_index[one],
        )
        alone = model.embed_images(alone, max_image_len=6, seed=8)
        got = model.pool(model.encode(tokens()[one, : LENGTHS[i]], alone))
        torch.testing.assert_close(got[0], pooled[i], rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_only_training_draws_subsets():
    model = small(max_image_len=6)
    assert model.embed_images(images()).lengths == (16, 17, 3, 11)
    assert model.embed_images(images(), max_image_len=6, seed=1).lengths == (7, 7, 3, 7)
    model.train()
    assert model.embed_images(images(), seed=1).lengths == (7, 7, 3, 7)
    assert model.embed_images(images(), max_image_len=-1).lengths == (16, 17, 3, 11)


@torch.no_grad()
def test_nothing_waits_for_the_device(monkeypatch):
    """Tensors without values: whatever reads one back fails."""

    def attend(q, k, v, *starts, max_seqlen_q, max_seqlen_k):
        assert type(max_seqlen_q) is type(max_seqlen_k) is int
        return torch.empty_like(q)

    # Autocast does not know such tensors, and the two operators take their references, which do
    # read back.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(vit, "cross_attention", attend)
    monkeypatch.setattr(vilt_heads, "soft_cross_entropy", lambda hidden, *_, **__: hidden.sum())
    model = small(tasks=ALL, max_image_len=6).train().to("meta")
    ids, masked = tokens().to("meta"), labels().to("meta")

    def on_device(batch):
        return batch._replace(images=batch.images.to("meta"))

    batches = on_device(images()), on_device(images(FALSE_SIZES))
    losses = model.pretraining_losses(ids, LENGTHS, ids, masked, *batches, max_masked=9)
    assert len(losses) == 4 and all(loss.shape == () for loss in losses.values())
    first, second = map(model.embed_images, batches)
    sequences = model.encode(ids, first.join(second), LENGTHS, image_index=[0, 5, 6, 3])
    assert sequences.text().shape == (4, 10, 48) and sequences.image().shape == (4, 7, 48)
    assert model.vqa_logits(sequences).shape == (4, 9)
    assert model.nlvr2_logits(ids, LENGTHS, first, second).shape == (4, 2)


def test_an_image_is_embedded_once_for_all_of_its_texts():
    model = small(tasks=("retrieval",))
    counted = []
    model.transformer.pos_drop.register_forward_hook(lambda *args: counted.append(args[2].shape))
    model.retrieval_loss(
        tokens()[None].expand(4, -1, -1), [LENGTHS] * 4, model.embed_images(images())
    )
    assert counted == [(16 + 17 + 3 + 11, 48)]


@pytest.mark.parametrize("reference", [False, True])
def test_pretraining_replaces_images_and_measures_named_rows(reference):
    """Each loss from its definition, on the rows of each pair alone."""
    model = small().double().use_reference(reference)
    got = pretraining(model, torch.float64)
    true, false = images(dtype=torch.float64), images(FALSE_SIZES, seed=5, dtype=torch.float64)
    distances, logits, words, targets = [], [], [], []
    for i, match in enumerate(MATCHES):
        source, (height, width) = (true, SIZES[i]) if match else (false, FALSE_SIZES[i])
        pixels = source.images[i : i + 1, :, : height * PATCH, : width * PATCH]
        ids = tokens()[i : i + 1, : LENGTHS[i]]
        text, image, pooled = model(ids, pixels)
        logits.append(model.itm_score["fc"](pooled))
        cosine = F.normalize(text[0, 1:-1], dim=-1) @ F.normalize(image[0, 1:], dim=-1).T
        distances.append((1 if match else -1) * transport_cost(1 - cosine))
        height, width = SIZES[i]
        pixels = true.images[i : i + 1, :, : height * PATCH, : width * PATCH]
        text = model(tokens(seed=4)[i : i + 1, : LENGTHS[i]], pixels)[0]
        chosen = labels()[i, : LENGTHS[i]] != -100
        words.append(model.mlm_score.logits(text[0, chosen]))
        targets.append(labels()[i, : LENGTHS[i]][chosen])
    expected = {
        "mlm_loss": F.cross_entropy(torch.cat(words), torch.cat(targets)),
        "itm_loss": F.cross_entropy(torch.cat(logits), torch.tensor(MATCHES).long()),
        "itm_wpa_loss": 0.1 * sum(distances) / 4,
    }
    expected["loss"] = sum(expected.values())
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-11, atol=1e-11)


def transport_cost(cost):
    """50 proximal point steps on one pair without padding."""
    n, m = cost.shape
    plan, sigma = torch.ones_like(cost), cost.new_full((n,), 1 / n)
    for _ in range(50):
        q = torch.exp(-cost / 0.5) * plan
        delta = 1 / (m * (sigma @ q))
        sigma = 1 / (n * (q @ delta))
        plan = sigma[:, None] * q * delta
    return (cost * plan).sum()


@torch.no_grad()
def test_sharing_the_images_changes_nothing_without_dropout_and_subsets():
    model = small()
    apart, shared = (pretraining(model, share_images=share) for share in (False, True))
    for name, value in apart.items():
        torch.testing.assert_close(value, shared[name], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_seed_fixes_matches_and_subsets():
    model = small(max_image_len=4, dropout=0.0).train()
    losses = [pretraining(model, matches=None, seed=seed)["loss"] for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


def test_half_of_the_pairs_match():
    assert [draw_matches(n, 0).sum().item() for n in (0, 1, 2, 7, 16)] == [0, 0, 1, 3, 8]
    assert torch.equal(draw_matches(64, 5), draw_matches(64, 5))
    assert not torch.equal(draw_matches(64, 5), draw_matches(64, 6))
    mean = torch.stack([draw_matches(8, seed) for seed in range(2000)]).float().mean(0)
    assert (mean - 0.5).abs().max() < 4.5 * (0.25 / 2000) ** 0.5


@pytest.mark.parametrize("reference", [False, True])
def test_no_label_gives_a_loss_of_zero(reference):
    model = small().use_reference(reference)
    sequences = model.encode(tokens(), model.embed_images(images()), LENGTHS)
    loss = model.mlm_loss(sequences, torch.full_like(tokens(), -100))
    loss.backward()
    assert loss == 0 and not any(p.grad.any() for p in model.mlm_score.parameters())


def test_vqa_targets():
    targets = vqa_targets([[3, 1], []], [[1.0, 0.3], []], 5)
    assert torch.equal(targets, torch.tensor([[0, 0.3, 0, 1, 0], [0, 0, 0, 0, 0]]))


def test_initialisation():
    torch.manual_seed(0)
    model = vilt.create("small", tasks=ALL, layers=2, vocab_size=300, answers=50)
    kinds = model.token_type_embeddings.weight
    assert kinds.shape[0] == 3 and torch.equal(kinds[1], kinds[2])
    assert torch.equal(model.rank_output.weight, model.itm_score["fc"].weight[1:])
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any() or name == "transformer.patch_embed.proj.bias", name
        elif "norm" in name.lower() or name.endswith("classifier.1.weight"):
            assert (parameter == 1).all(), name
        elif not name.startswith("transformer.") and parameter.numel() > 5000:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name


def test_published_parameter_counts():
    with torch.device("meta"):
        model = vilt.create("base-p32-384")
    count = sum(p.numel() for p in model.parameters())
    head = sum(p.numel() for p in model.mlm_score.parameters())
    vision = sum(p.numel() for p in model.transformer.parameters())
    assert [round(x / 1e6, 1) for x in (count - head, head, vision)] == [111.6, 24.1, 87.5]


def test_save_and_load(tmp_path):
    model = small(tasks=("vqa", "mlm"), eps=1e-12)
    vilt.save(model, tmp_path / "model")
    loaded = vilt.load(tmp_path / "model")
    assert loaded.config == model.config
    assert [m.eps for m in loaded.modules() if hasattr(m, "eps")] == [
        m.eps for m in model.modules() if hasattr(m, "eps")
    ]
    assert all(map(torch.equal, loaded.state_dict().values(), model.state_dict().values()))


def test_epsilons():
    model = small(tasks=ALL, eps=1e-3, text_eps=1e-4)
    assert model.transformer.norm.eps == model.transformer.blocks[1].norm2.eps == 1e-3
    assert model.text_embeddings.LayerNorm.eps == 1e-4
    assert model.mlm_score.transform["LayerNorm"].eps == 1e-4
    assert model.vqa_classifier[1].eps == model.nlvr2_classifier[1].eps == 1e-5


def test_dropout_is_drawn_in_training_only():
    model = small(dropout=0.5)
    with torch.no_grad():
        quiet = [pretraining(model)["loss"] for _ in range(2)]
        model.train()
        noisy = [pretraining(model)["loss"] for _ in range(2)]
    assert quiet[0] == quiet[1] and len({x.item() for x in (quiet[0], *noisy)}) == 3


@pytest.mark.parametrize(
    "arguments, error, name",
    [
        (dict(tokens=tokens().float()), TypeError, "tokens"),
        (dict(tokens=tokens(padded=13)), ValueError, "tokens"),
        (dict(tokens=tokens().fill_(10**6)), ValueError, "tokens"),
        (dict(tokens=tokens() - 10**6), ValueError, "tokens"),
        (dict(tokens=None), TypeError, "tokens"),
        (dict(text=[1, 2]), ValueError, "text"),
        (dict(text=[1, 2, 3, 11]), ValueError, "text"),
        (dict(text=[0, 2, 3, 4]), ValueError, "text"),
        (dict(text=torch.eye(4, 10)), ValueError, "text"),
        (dict(image_index=[0, 1, 2]), ValueError, "image_index"),
        (dict(image_index=[0, 1, 2, 4]), ValueError, "image_index"),
        (dict(tokens=tokens()[:3], text=None), ValueError, "image_index"),
        (dict(image_type=2), ValueError, "image_type"),
        (dict(image_type=0), ValueError, "image_type"),
    ],
)
def test_bad_arguments(arguments, error, name):
    model = small()
    good = dict(tokens=tokens(), images=model.embed_images(images()), text=LENGTHS)
    with pytest.raises(error, match=f"^{name}: "):
        model.encode(**(good | arguments))


def test_bad_configurations():
    with pytest.raises(ValueError, match="^tasks: "):
        vilt.create("tiny", tasks=("mpp",))
    with pytest.raises(ValueError, match="^max_image_len: "):
        vilt.create("tiny", max_image_len=0)
    with pytest.raises(ValueError, match="^name: "):
        vilt.create("huge")
    with pytest.raises(TypeError, match="depth"):
        vilt.create("tiny", depth=3)
    assert dataclasses.replace(vilt.CONFIGS["tiny"], tasks=("nlvr2",)).modalities == 3
