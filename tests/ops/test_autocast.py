"""Inside of torch.autocast: float64 stays what it is, as in torch's own matmul."""

import pytest
import torch

from fastvlp import losses, ops
from fastvlp.nn.feed_forward import Norm, feed_forward, norm_linear
from fastvlp.ops.autocast import as_autocast


def rows(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


NORM = Norm(torch.ones(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64), 1e-5)
CALLS = {
    "ClipLoss": lambda: losses.ClipLoss()(rows(5, 6), rows(5, 6) + 1, 3.0),
    "SigLipLoss": lambda: losses.SigLipLoss()(rows(5, 6), rows(5, 6) + 1, 3.0, -1.0),
    "soft_cross_entropy": lambda: ops.soft_cross_entropy(
        rows(5, 6), rows(9, 6), None, torch.arange(5)
    ),
    "norm_linear": lambda: norm_linear(rows(5, 6), NORM, rows(4, 6), rows(4)),
    "feed_forward": lambda: feed_forward(
        rows(5, 6), NORM, rows(8, 6), rows(8), rows(6, 8), rows(6)
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_float64_stays_float64(name):
    plain = CALLS[name]()
    with torch.autocast("cpu", torch.bfloat16):
        inside = CALLS[name]()
    assert inside.dtype == torch.float64
    assert torch.equal(inside, plain)


def test_the_rest_is_cast_as_by_a_matmul():
    tensors = [torch.ones(2, 2, dtype=d) for d in (torch.float32, torch.float16, torch.float64)]
    assert [t.dtype for t in as_autocast(*tensors)] == [t.dtype for t in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        found = as_autocast(*tensors)
        assert [t.dtype for t in found] == [(t @ t).dtype for t in tensors]
        integers = torch.arange(3)
        untouched = as_autocast(None, "text", integers)
    assert untouched == (None, "text", integers)
