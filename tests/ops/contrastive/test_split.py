"""float32 contrastive losses where products run on bfloat16 tiles: no bit of a float may be lost.
Every instruction set has to pass."""

import contextlib

import pytest
import torch
from fastvlp_tests.contrastive_cases import features, run
from fastvlp_tests.tolerance import assert_as_accurate, epsilon

from fastvlp.ops import (
    contrastive,
    contrastive_reference,
    sigmoid_contrastive,
    sigmoid_contrastive_reference,
)

ISAS = torch.ops.fastvlp.cpu_instruction_sets().split(",")
NAMES = ("loss", "image", "text")


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("FASTVLP_CPU_ISA", request.param)


def positives(x, y, scale=1.0):
    """The logits of the pairs as the forward pass leaves them."""
    kept = torch.empty(0)
    return torch.ops.fastvlp.contrastive_statistics(
        x, y, torch.tensor(scale), kept, 0, True, True, 64, 96, 0
    )[2]


@pytest.mark.parametrize("n, dim", [(1, 1), (33, 33), (150, 40), (130, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_product_with_one_is_exact(isa, n, dim, dtype):
    # A float has 24 bits, a bfloat16 8: one part missing would show.
    x = torch.randn(n, dim, generator=torch.Generator().manual_seed(0)).to(dtype)
    at = torch.arange(n) % dim
    y = torch.zeros(n, dim, dtype=dtype)
    y[torch.arange(n), at] = 1.0
    expected = x[torch.arange(n), at].float()
    assert torch.equal(positives(x, y), expected)
    assert torch.equal(positives(y, x), expected)
    assert torch.equal(positives(x, y, 2.0**40), expected * 2.0**40)


@pytest.mark.parametrize("exponent", [-148, -125, -110, -60, 60, 125])
def test_a_product_with_one_is_exact_at_any_magnitude(isa, exponent):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(70, 70, generator=generator, dtype=torch.float64).clamp(-2, 2)
    x = (x * 2.0**exponent).float()
    if exponent == -148:  # subnormals
        assert x.abs().max() < torch.finfo(torch.float32).tiny
    y = torch.eye(70)
    assert torch.equal(positives(x, y), x.diag())
    assert torch.equal(positives(y, x), x.diag())


def test_magnitudes_mixed_within_a_block(isa):
    x = torch.randn(70, 70, generator=torch.Generator().manual_seed(0))
    x = x * 2.0 ** torch.arange(-70, 0)
    y = torch.eye(70)
    assert torch.equal(positives(x, y), x.diag())
    assert torch.equal(positives(y, x), x.diag())


@pytest.mark.parametrize(
    "norm, scale, upstream",
    [
        (1e-33, 1e36, 1.0),
        (1e-19, 1e37, 1.0),
        (1e15, 1e-29, 1.0),
        (1.0, 20.0, 1e-30),
        (1.0, 20.0, 1e30),
        (1e-12, 1e25, 1e-22),
    ],
)
def test_extreme_magnitudes_round_no_worse_than_eager(isa, norm, scale, upstream):
    image, text = features(200, 70, torch.float32, "cpu", norm=norm)
    ours = run(contrastive, image, text, scale, 0.0, upstream=upstream, workspace_bytes=40_000)
    eager = run(contrastive_reference, image, text, scale, 0.0, upstream=upstream)
    exact = run(contrastive_reference, image, text, scale, 0.0, torch.float64, upstream)
    for name in NAMES:
        wanted = getattr(exact, name)
        floor = 4 * epsilon(torch.float32) * wanted.norm().item()
        assert_as_accurate(name, getattr(ours, name), getattr(eager, name), wanted, floor)


@pytest.mark.parametrize("norm, scale, upstream", [(1e-33, 1e36, 1.0), (1.0, 5.0, 1e-30)])
def test_extreme_magnitudes_of_the_sigmoid_loss(isa, norm, scale, upstream):
    image, text = features(150, 70, torch.float32, "cpu", norm=norm)
    ours = run(sigmoid_contrastive, image, text, scale, -20.0, upstream=upstream)
    eager = run(sigmoid_contrastive_reference, image, text, scale, -20.0, upstream=upstream)
    exact = run(sigmoid_contrastive_reference, image, text, scale, -20.0, torch.float64, upstream)
    for name in NAMES:
        wanted = getattr(exact, name)
        floor = 4 * epsilon(torch.float32) * wanted.norm().item()
        assert_as_accurate(name, getattr(ours, name), getattr(eager, name), wanted, floor)


def test_far_negatives_keep_their_gradients(isa):
    # exp(-80) of the row sums: below what a tile keeps of a weight that has not been raised.
    n = 64
    image = torch.eye(n).requires_grad_()
    text = torch.eye(n)
    contrastive(image, text, 80.0, direction="image_to_text").backward()
    exact = torch.eye(n, dtype=torch.float64).requires_grad_()
    contrastive_reference(exact, text.double(), 80.0, direction="image_to_text").backward()
    off = ~torch.eye(n, dtype=torch.bool)
    torch.testing.assert_close(image.grad[off].double(), exact.grad[off], rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("n, dim", [(640, 512), (300, 1100)])
def test_sums_round_no_worse_than_eager(isa, n, dim):
    # Weights are near 1/N at this scale, so that what shows is the rounding of products.
    image, text = features(n, dim, torch.float32, "cpu")
    ours = run(contrastive, image, text, 1.0, 0.0)
    eager = run(contrastive_reference, image, text, 1.0, 0.0)
    exact = run(contrastive_reference, image, text, 1.0, 0.0, torch.float64)
    for name in ("image", "text"):
        assert_as_accurate(name, getattr(ours, name), getattr(eager, name), getattr(exact, name))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_stays_in_its_own_row(isa, value):
    x, y = features(70, 40, torch.float32, "cpu")
    clean = positives(x, y)
    x[3, 5] = value
    found = positives(x, y)
    assert not found[3].isfinite()
    others = torch.arange(70) != 3
    torch.testing.assert_close(found[others], clean[others], rtol=1e-6, atol=1e-6)


def test_threads_do_not_change_a_bit(isa):
    image, text = features(700, 64, torch.float32, "cpu")
    results = []
    for threads in (1, 2):
        with threads_at(threads):
            results.append(positives(image, text))
    assert torch.equal(*results)


@contextlib.contextmanager
def threads_at(n):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
