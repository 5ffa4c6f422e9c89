"""Dropout keeps the right share of the values, and their mean."""

import pytest
import torch

from fastvlp.nn import Dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.93])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_share_and_factor(p, dtype):
    torch.manual_seed(0)
    n = 300_001
    x = torch.ones(n, dtype=dtype, requires_grad=True)
    y = Dropout(p)(x)
    y.backward(torch.full_like(y, 3))
    assert y.dtype == dtype and y.shape == x.shape
    values = y.detach().unique()
    expected = torch.tensor([0, 1 / (1 - p)], dtype=dtype)
    torch.testing.assert_close(values, expected, rtol=max(2e-4, torch.finfo(dtype).eps), atol=0)
    assert abs((y == 0).double().mean() - p) < 4.5 * (p * (1 - p) / n) ** 0.5 + 2**-17
    torch.testing.assert_close(x.grad, 3 * y.detach())


def test_values_are_independent():
    """No place in a word, and no pair of neighbours, is special."""
    torch.manual_seed(0)
    n, p = 1 << 20, 0.25
    kept = (Dropout(p)(torch.ones(n)) > 0).double() - (1 - p)
    deviation = (p * (1 - p)) ** 0.5
    for places in kept.view(-1, 4).T:
        assert abs(places.mean()) < 4.5 * deviation / (n / 4) ** 0.5
    for lag in range(1, 9):
        product = (kept[lag:] * kept[:-lag]).mean()
        assert abs(product) < 4.5 * deviation**2 / n**0.5


def test_the_generator_decides():
    layer, x = Dropout(0.5), torch.ones(7, 5)
    torch.manual_seed(1)
    first, second = layer(x), layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first) and not torch.equal(first, second)
    layer.reference = True
    torch.manual_seed(1)
    plain = layer(x)
    torch.manual_seed(1)
    assert torch.equal(plain, torch.nn.functional.dropout(x, 0.5))


@pytest.mark.parametrize("p, expected", [(0.0, 1.0), (1.0, 0.0), (1e-9, 1.0)])
def test_extremes(p, expected):
    assert torch.all(Dropout(p)(torch.ones(1000)) == expected)


def test_evaluation_and_empty_and_strided_inputs():
    x = torch.randn(4, 6)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.5)(x[:0]).shape == (0, 6)
    y = Dropout(0.5)(x.T)
    assert y.shape == (6, 4) and torch.all((y == 0) | (y == 2 * x.T))


def test_keeps_one_byte_a_value():
    x, kept = torch.randn(1000, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        Dropout(0.3)(x)
    assert sum(t.untyped_storage().nbytes() for t in kept) == 1000


def test_second_derivative():
    x = torch.randn(50, dtype=torch.float64, requires_grad=True)

    def run(x):
        torch.manual_seed(0)
        return Dropout(0.3)(x).pow(3)

    assert torch.autograd.gradgradcheck(run, x)
