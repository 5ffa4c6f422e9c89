"""CLIP's initialisation, text truncation, temperature, files and errors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlp.models import clip

SMALL = dict(
    vision_width=32,
    vision_layers=2,
    vision_heads=2,
    text_width=32,
    text_layers=2,
    text_heads=2,
    context_length=12,
    vocab_size=50,
)
RESNET = dict(
    vision_width=8, vision_layers=(1, 2, 1, 1), vision_heads=4, patch_size=32, activation="gelu"
)


def small(**overrides):
    torch.manual_seed(0)
    return clip.create("tiny", **(SMALL | overrides))


@pytest.fixture(scope="module")
def initialised():
    torch.manual_seed(0)
    return clip.create("ViT-B/32", vision_layers=2, text_layers=3, vocab_size=3000)


def assert_spread(values, std):
    """Mean 0 and the given standard deviation, within five standard errors."""
    values, n = values.detach().double().flatten(), values.numel()
    assert abs(values.mean()) <= 5 * std / math.sqrt(n)
    assert abs(values.std() - std) <= 5 * std / math.sqrt(2 * n)


def test_text_initialisation(initialised):
    width, layers = 512, 3
    assert_spread(initialised.token_embedding.weight, 0.02)
    assert_spread(initialised.positional_embedding, 0.01)
    assert_spread(initialised.text_projection, width**-0.5)
    for block in initialised.transformer.resblocks:
        assert_spread(block.attn.in_proj_weight, width**-0.5)
        assert_spread(block.attn.out_proj.weight, width**-0.5 * (2 * layers) ** -0.5)
        assert_spread(block.mlp.c_fc.weight, (2 * width) ** -0.5)
        assert_spread(block.mlp.c_proj.weight, width**-0.5 * (2 * layers) ** -0.5)


def test_image_initialisation(initialised):
    visual, width = initialised.visual, 768
    for parameter in (visual.class_embedding, visual.positional_embedding, visual.proj):
        assert_spread(parameter, width**-0.5)
    assert_spread(visual.conv1.weight, (3 * 3 * 32**2) ** -0.5)
    for block in visual.transformer.resblocks:
        # Xavier's uniform distribution for [3 width, width], PyTorch's default for the others.
        assert_spread(block.attn.in_proj_weight, (2 / (4 * width)) ** 0.5)
        assert_spread(block.attn.out_proj.weight, (3 * width) ** -0.5)
        assert_spread(block.mlp.c_fc.weight, (3 * width) ** -0.5)
        assert_spread(block.mlp.c_proj.weight, (3 * 4 * width) ** -0.5)


def test_resnet_initialisation():
    torch.manual_seed(0)
    visual = clip.create("RN50", text_layers=1, vocab_size=50, image_size=32).visual
    pool, width = visual.attnpool, 2048
    assert_spread(pool.positional_embedding, width**-0.5)
    for projection in (pool.q_proj, pool.k_proj, pool.v_proj, pool.c_proj):
        assert_spread(projection.weight, width**-0.5)
    for name, parameter in visual.named_parameters():
        if "bn" in name or "downsample.1" in name:
            one = name.endswith("weight") and not ("layer" in name and "bn3" in name)
            assert torch.all(parameter == one), name


def test_constant_initialisation(initialised):
    for name, parameter in initialised.named_parameters():
        if "attn" in name and name.endswith("bias"):
            assert torch.count_nonzero(parameter) == 0, name
        if "ln_" in name:
            assert torch.all(parameter == (1 if name.endswith("weight") else 0)), name
    assert initialised.logit_scale.shape == ()
    assert initialised.logit_scale.item() == pytest.approx(math.log(1 / 0.07))


@pytest.mark.parametrize(
    "name, millions",
    [
        ("ViT-B/32", 151.28),
        ("ViT-B/16", 149.62),
        ("ViT-L/14", 427.62),
        ("ViT-L/14@336px", 427.94),
        ("RN50", 102.01),
        ("RN101", 119.69),
        ("RN50x4", 178.30),
        ("RN50x16", 290.98),
        ("RN50x64", 623.26),
        ("ViT-S/32", 63.09),
        ("ViT-M/32", 103.12),
        ("ViT-H/14", 986.11),
        ("ViT-g/14", 1366.68),
        ("ViT-bigG/14", 2539.57),
    ],
)
def test_published_parameter_counts(name, millions):
    with torch.device("meta"):
        model = clip.create(name)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)


def test_forward():
    model = small()
    images, tokens = torch.randn(3, 3, 64, 64), torch.tensor([[1, 49, 0], [2, 3, 49]])
    image, text, scale = model(images, tokens)
    assert image.shape == (3, 512) and text.shape == (2, 512) and scale.shape == ()
    for features in (image, text):
        torch.testing.assert_close(features.norm(dim=1), torch.ones(len(features)))
    assert scale.item() == pytest.approx(1 / 0.07)
    torch.testing.assert_close(model.encode_text(tokens.int()), model.encode_text(tokens))


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_features_have_norm_one(autocast):
    """The common error of a row is far below one unit in the last place of bfloat16."""
    model = small() if autocast else small().bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        image, text, _ = model(torch.randn(5, 3, 64, 64), torch.tensor([[1, 49, 0], [2, 3, 49]]))
    for features in (image, text):
        assert features.dtype == torch.bfloat16
        assert (features.float().norm(dim=1) - 1).abs().max() < 1e-3


@st.composite
def texts(draw):
    """Token ids with the end token (49) in every row and anything smaller after it."""
    length = draw(st.integers(1, 12))
    rows = draw(
        st.lists(
            st.lists(st.integers(0, 48), min_size=length, max_size=length), min_size=1, max_size=5
        )
    )
    tokens = torch.tensor(rows)
    for row in tokens:
        row[draw(st.integers(0, length - 1))] = 49
    return tokens


@settings(max_examples=30)
@given(tokens=texts(), end_token=st.sampled_from([None, 49]))
@torch.no_grad()
def test_what_follows_the_end_token_is_dropped_without_effect(tokens, end_token):
    model = small(end_token=end_token).double()
    rows = []
    hook = model.transformer.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape))
    features = model.encode_text(tokens)
    hook.remove()
    ends = tokens.argmax(dim=1)
    assert rows == [(int((ends + 1).sum()), 32)]
    for row, end, feature in zip(tokens, ends, features, strict=True):
        alone = model.encode_text(row[None, : end + 1])[0]
        torch.testing.assert_close(feature, alone, rtol=1e-12, atol=1e-12)
    padded = model.use_reference().encode_text(tokens)
    torch.testing.assert_close(features, padded, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reference", [False, True])
@torch.no_grad()
def test_the_first_end_token_counts(reference):
    """Ids above the end token, and the end token as padding, as in transformers' tokenizers."""
    model = small(end_token=40).use_reference(reference)
    first = model.encode_text(torch.tensor([[1, 45, 40, 40, 49]]))
    torch.testing.assert_close(first, model.encode_text(torch.tensor([[1, 45, 40]])))
    with pytest.raises(ValueError, match="must hold the end token 40 in each row"):
        model.encode_text(torch.tensor([[1, 40], [1, 2]]))


def test_empty_batches():
    image, text, _ = small()(torch.empty(0, 3, 64, 64), torch.empty(0, 12, dtype=torch.int64))
    assert image.shape == text.shape == (0, 512)


@pytest.mark.parametrize("sizes", [{}, RESNET], ids=["vit", "resnet"])
def test_traces_without_a_graph_break(sizes):
    model = small(**sizes).eval()
    images, tokens = torch.randn(2, 3, 64, 64), torch.tensor([[1, 49, 0], [2, 3, 49]])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for got, expected in zip(compiled(images, tokens), model(images, tokens), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("value, clamped", [(-1.0, 0.0), (2.0, 2.0), (9.0, math.log(100))])
def test_clamp_logit_scale(value, clamped):
    model = small()
    torch.nn.init.constant_(model.logit_scale, value)
    model.clamp_logit_scale_()
    assert model.logit_scale.item() == pytest.approx(clamped)
    assert model.logit_scale.requires_grad


@pytest.mark.parametrize("sizes", [{}, RESNET | {"end_token": 3}], ids=["vit", "resnet"])
def test_save_and_load(tmp_path, sizes):
    model = small(**sizes).eval()
    clip.save(model, tmp_path / "new" / "model")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [
        "model.json",
        "model.safetensors",
    ]
    loaded = clip.load(tmp_path / "new" / "model")
    assert loaded.config == model.config and not loaded.training
    assert all(
        torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items()
    )


def test_load_without_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        clip.load(tmp_path / "absent")


@pytest.mark.parametrize(
    "images, error",
    [
        (torch.zeros(2, 3, 64, 64, dtype=torch.uint8), TypeError),
        (torch.zeros(2, 3, 32, 32), ValueError),
        (torch.zeros(2, 64, 64, 3), ValueError),
        (torch.zeros(3, 64, 64), ValueError),
    ],
)
def test_bad_images(images, error):
    with pytest.raises(error, match="^images must be"):
        small().encode_image(images)


@pytest.mark.parametrize(
    "tokens, error",
    [
        (torch.zeros(2, 12), TypeError),
        (torch.zeros(2, 12, dtype=torch.uint8), TypeError),
        (torch.zeros(2, 13, dtype=torch.int64), ValueError),
        (torch.zeros(2, 0, dtype=torch.int64), ValueError),
        (torch.zeros(12, dtype=torch.int64), ValueError),
        (torch.tensor([[1, 50]]), ValueError),
        (torch.tensor([[49, -1]]), ValueError),
    ],
)
def test_bad_tokens(tokens, error):
    with pytest.raises(error, match="^tokens must "):
        small().encode_text(tokens)


@pytest.mark.parametrize(
    "overrides, error, name",
    [
        (dict(patch_size=7), ValueError, "patch_size"),
        (dict(vision_heads=5), ValueError, "vision_heads"),
        (dict(text_heads=5), ValueError, "text_heads"),
        (dict(text_layers=0), ValueError, "text_layers"),
        (dict(embed_dim=2.5), ValueError, "embed_dim"),
        (dict(vision_hidden=0), ValueError, "vision_hidden"),
        (dict(end_token=-1), ValueError, "end_token"),
        (RESNET | dict(vision_layers=(1, 2, 3)), ValueError, "vision_layers"),
        (RESNET | dict(vision_layers=(1, 2, 3, 0)), ValueError, "vision_layers"),
        (RESNET | dict(vision_heads=7), ValueError, "vision_heads must divide 32 times"),
        (RESNET | dict(patch_size=16), ValueError, "patch_size"),
        (RESNET | dict(image_size=80), ValueError, "image_size"),
        (dict(activation="relu"), ValueError, "activation"),
        (dict(depth=3), TypeError, "depth"),
    ],
)
def test_bad_sizes(overrides, error, name):
    with pytest.raises(error, match=name):
        clip.create("tiny", **overrides)


def test_unknown_name():
    with pytest.raises(ValueError, match="^name: expected one of"):
        clip.create("ViT-B-33")
