"""The same weights give the same features, losses and gradients as in open_clip, with the kernels
and without."""

import copy

import open_clip
import pytest
import torch
from fastvlp_tests.clip_cases import inputs, open_clip_model, open_clip_sizes
from fastvlp_tests.tolerance import AddedTerms, assert_as_accurate, epsilon

from fastvlp.losses import ClipLoss
from fastvlp.models import clip
from fastvlp.models.checkpoints import load_clip

SIZES = {
    "RN50": "RN50-quickgelu",
    "RN101": "RN101-quickgelu",
    "RN50x4": "RN50x4-quickgelu",
    "RN50x16": "RN50x16-quickgelu",
    "RN50x64": "RN50x64-quickgelu",
    "ViT-B/32": "ViT-B-32-quickgelu",
    "ViT-B/16": "ViT-B-16-quickgelu",
    "ViT-L/14": "ViT-L-14-quickgelu",
    "ViT-L/14@336px": "ViT-L-14-336-quickgelu",
    "ViT-S/32": "ViT-S-32",
    "ViT-S/16": "ViT-S-16",
    "ViT-M/32": "ViT-M-32",
    "ViT-H/14": "ViT-H-14",
    "ViT-g/14": "ViT-g-14",
    "ViT-bigG/14": "ViT-bigG-14",
}
PEERS = {
    "ViT-B-32": {},
    "ViT-B-32-quickgelu": {},
    "ViT-H-14": {"layers": 1, "vision": {"image_size": 56, "layers": 2}},
    "RN50": {"layers": 1, "vision": {"image_size": 64}},
}


@pytest.mark.parametrize("name", SIZES)
def test_state_dict_has_open_clips_names_and_shapes(name):
    sizes = open_clip.get_model_config(SIZES[name])
    with torch.device("meta"):
        peer = open_clip.model.CLIP(**sizes)
        ours = clip.create(name)
    expected = {key: value.shape for key, value in peer.state_dict().items()}
    assert {key: value.shape for key, value in ours.state_dict().items()} == expected
    assert list(clip.CONFIGS) == ["tiny", *SIZES]
    assert (ours.config.activation == "quick_gelu") == sizes.get("quick_gelu", False)


@pytest.fixture(scope="module", params=PEERS)
def pair(request):
    peer = open_clip_model(request.param, **PEERS[request.param])
    sizes = open_clip_sizes(request.param, **PEERS[request.param])
    ours, report = load_clip(peer.state_dict(), config=sizes)
    assert report.loaded == len(peer.state_dict()) and not report.missing + report.unused
    return ours, peer


@torch.no_grad()
def test_features_equal_open_clips(pair):
    ours, peer = pair
    images, tokens = inputs(ours.config)
    got = ours(images, tokens)
    ours.double()
    peer.double()
    try:
        for got64, peer64 in zip(
            ours(images.double(), tokens), peer(images.double(), tokens), strict=True
        ):
            assert (got64 - peer64).norm() <= 1e-12 * peer64.norm()
        exact = peer(images.double(), tokens)
    finally:
        ours.float()
        peer.float()
    theirs = peer(images, tokens)
    loss, expected = ClipLoss()(*got), open_clip.loss.ClipLoss()(*theirs)
    assert abs(loss - expected) <= 1e-5 * expected
    for name, o, p, e in zip(("image", "text", "scale"), got, theirs, exact, strict=True):
        assert (o - p).norm() <= 1e-5 * p.norm()
        assert_as_accurate(name, o, p, e, floor=epsilon(torch.float32) * e.norm().item())


@pytest.mark.parametrize("pair", ["ViT-B-32", "RN50"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_is_as_accurate_as_open_clips(pair, dtype):
    ours, peer = pair
    images, tokens = inputs(ours.config)
    exact = [t.double() for t in peer(images, tokens)]
    with torch.autocast("cpu", dtype):
        got, theirs = ours(images, tokens), peer(images, tokens)
    for name, o, p, e in zip(("image", "text"), got, theirs, exact, strict=False):
        assert o.dtype == dtype
        assert_as_accurate(name, o, p, e, floor=epsilon(dtype) * e.norm().item())


def gradients(model, images, tokens):
    """Of a fixed linear function of everything that the model returns."""
    model.zero_grad()
    image, text, scale = model(images, tokens)
    towards = torch.randn(2, *image.shape, generator=torch.Generator().manual_seed(2))
    ((image.double() * towards[0]).sum() + (text.double() * towards[1]).sum() + scale).backward()
    return {name: p.grad.double() for name, p in model.named_parameters()}


def check_gradients(ours, eager, wanted, images, tokens, autocast=False):
    """Ours are as accurate as those of `eager`. wanted: of `exact_gradients`."""
    exact, sizes = wanted
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got, theirs = gradients(ours, images, tokens), gradients(eager, images, tokens)
    assert got.keys() == exact.keys()
    floor = epsilon(torch.bfloat16 if autocast else torch.float32)
    for name in got:
        size = sizes[name].norm().item()
        assert_as_accurate(name, got[name], theirs[name], exact[name], floor=floor * size)


def exact_gradients(peer, ours, images, tokens):
    """Gradients in float64, and what their rounding is relative to.

    That is the gradients themselves, but the terms that they add for a bias of keys, which moves
    all logits of a row alike: its gradient is zero in exact arithmetic.
    """
    exact = gradients(copy.deepcopy(peer).double(), images.double(), tokens)
    biases = [name for name in exact if name.endswith("k_proj.bias")]
    if not biases:
        return exact, exact
    plain = copy.deepcopy(ours).double().use_reference()
    with AddedTerms() as terms:
        gradients(plain, images.double(), tokens)
    return exact, exact | {name: terms.of(plain.get_parameter(name)) for name in biases}


@pytest.mark.parametrize(
    "pair",
    [
        "ViT-B-32-quickgelu",
        pytest.param("ViT-H-14", marks=pytest.mark.thorough),
        pytest.param("RN50", marks=pytest.mark.thorough),
    ],
    indirect=True,
)
def test_gradients_are_as_accurate_as_those_of_open_clip_and_of_plain_pytorch(pair):
    ours, peer = pair
    data = inputs(ours.config)
    exact = exact_gradients(peer, ours, *data)
    check_gradients(ours, peer, exact, *data)
    check_gradients(ours, peer, exact, *data, autocast=True)
    check_gradients(ours, copy.deepcopy(ours).use_reference(), exact, *data)


@pytest.mark.parametrize("pair", ["RN50"], indirect=True)
def test_batch_norm_in_training(pair):
    """Features, running statistics and gradients with the statistics of the batch."""
    ours, peer = (copy.deepcopy(model).train() for model in pair)
    images, tokens = inputs(ours.config, 4)
    with torch.no_grad():
        for got, expected in zip(ours(images, tokens), peer(images, tokens), strict=True):
            assert (got - expected).norm() <= 1e-5 * expected.norm()
    for name, value in peer.visual.named_buffers():
        got = ours.visual.get_buffer(name)
        assert (got - value).double().norm() <= 1e-5 * value.double().norm(), name
    exact = exact_gradients(peer, ours, images, tokens)
    check_gradients(ours, peer, exact, images, tokens)
    check_gradients(ours, copy.deepcopy(ours).use_reference(), exact, images, tokens)
