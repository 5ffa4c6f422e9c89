"""sigmoid_contrastive against its float64 reference."""

import math

import pytest
import torch
from fastvlp_tests import instruction_sets
from fastvlp_tests.contrastive_cases import features, run
from fastvlp_tests.tolerance import assert_as_accurate, epsilon
from hypothesis import given
from hypothesis import strategies as st

from fastvlp.ops import sigmoid_contrastive, sigmoid_contrastive_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(image, text, scale, bias, upstream=1.0, **kwargs):
    ours = run(sigmoid_contrastive, image, text, scale, bias, upstream=upstream, **kwargs)
    eager = run(sigmoid_contrastive_reference, image, text, scale, bias, upstream=upstream)
    exact = run(sigmoid_contrastive_reference, image, text, scale, bias, torch.float64, upstream)
    n, dtype = len(image), image.dtype
    logits = scale * image.double() @ text.double().T + bias
    single = epsilon(torch.float32)
    # Each of N^2 terms is as large as its logit at most; their sum is divided by N.
    size = torch.nn.functional.softplus(logits).sum().item() / n + logits.abs().max().item()
    assert_as_accurate("loss", ours.loss, eager.loss, exact.loss, floor=single * size)
    probability = logits.sigmoid()
    sharpness = single * (1 + logits.abs().max().item())
    for name, weight, other in (("image", probability, text), ("text", probability.T, image)):
        wanted = getattr(exact, name)
        terms = (upstream * scale / n) * ((weight + torch.eye(n, device=weight.device))
                                          @ other.double().abs()).norm().item()  # fmt: skip
        floor = sharpness * terms + epsilon(dtype) * wanted.norm().item()
        if dtype != torch.float32:  # logit gradients of this dtype, summed with random signs
            floor += epsilon(dtype) * terms / math.sqrt(n)
        assert_as_accurate(name, getattr(ours, name), getattr(eager, name), wanted, floor)
    total = upstream / n * (probability.sum().item() + n)
    assert_as_accurate("bias", ours.bias, eager.bias, exact.bias, sharpness * total)
    floor = sharpness * total * logits.abs().max().item() / scale
    if dtype != torch.float32:
        floor += epsilon(dtype) * (exact.image * image.double()).abs().sum().item() / scale
    assert_as_accurate("scale", ours.scale, eager.scale, exact.scale, floor)
    return ours


@given(
    n=st.sampled_from([1, 2, 3, 31, 33, 64, 97]),
    dim=st.sampled_from([1, 7, 16, 33, 129]),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1.0, 10.0, 100.0]),
    bias=st.sampled_from([0.0, -10.0, 5.0]),
    norm=st.sampled_from([1.0, 0.05, None]),
    workspace=st.sampled_from([1, 40_000, 1 << 28]),
    strided=st.booleans(),
)
def test_matches_float64(device, n, dim, dtype, scale, bias, norm, workspace, strided):
    image, text = features(n, dim, dtype, device, norm=norm, strided=strided)
    check(image, text, scale, bias, 0.7, workspace_bytes=workspace)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("workspace", [1, 4 << 20, 1 << 28])
def test_several_blocks(device, dtype, workspace):
    image, text = features(1100, 65, dtype, device)
    check(image, text, 10.0, -10.0, workspace_bytes=workspace)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512_bf16", "amx"])
def test_every_instruction_set(monkeypatch, isa):
    instruction_sets.force(monkeypatch, isa)
    for dtype in DTYPES:
        image, text = features(130, 67, dtype, "cpu")
        check(image, text, 10.0, -10.0)


def test_far_negatives_are_relatively_exact(device):
    # At a bias of -20 every negative costs 2e-9: lost entirely when 1 + exp(z) is rounded first.
    image, text = features(300, 32, torch.float32, device)
    ours = sigmoid_contrastive(image, text, 1.0, -20.0).double()
    exact = sigmoid_contrastive_reference(image.double(), text.double(), 1.0, -20.0)
    positives = 20.0 - (image.double() * text.double()).sum(1).mean()
    torch.testing.assert_close(ours - positives, exact - positives, rtol=0, atol=4e-6)
    text = -image  # positives too far apart to matter: only negatives are left
    ours = sigmoid_contrastive(image[:1], text[:1], 1.0, 30.0)
    assert ours.item() == pytest.approx(math.exp(-29.0), rel=1e-5)


def test_nan_reaches_the_loss(device):
    image, text = features(40, 16, torch.float32, device)
    image[3, 5] = float("nan")
    assert sigmoid_contrastive(image, text, 10.0, -10.0).isnan()


def test_bitwise_deterministic(device):
    image, text = features(700, 64, torch.bfloat16, device)
    first = run(sigmoid_contrastive, image, text, 20.0, -10.0, workspace_bytes=1 << 20)
    second = run(sigmoid_contrastive, image, text, 20.0, -10.0, workspace_bytes=1 << 20)
    for name in ("loss", "image", "text", "scale", "bias"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


def test_second_derivative_is_refused(device):
    image, text = features(8, 4, torch.float32, device)
    image.requires_grad_()
    loss = sigmoid_contrastive(image, text, 5.0, -5.0)
    (gradient,) = torch.autograd.grad(loss, image, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()
