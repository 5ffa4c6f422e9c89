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


def attention(**options):
    q, keys, starts = rows(6, 2, 8).float(), rows(2, 5, 2, 8).float(), torch.tensor([0, 2, 6])
    found = ops.cross_attention(q, keys, keys + 1, starts, **options)
    return found[0] if isinstance(found, tuple) else found


def momentum():
    students = rows(5, 6).float(), rows(5, 6).float() + 1
    return ops.momentum_contrastive(*students, *students, *students, 0.1, seed=3).loss


def alignment():
    return ops.word_patch_alignment(
        rows(2, 5, 6).float(), rows(2, 4, 6).float(), *(torch.zeros(2, n) > 0 for n in (5, 4))
    )


SINGLE = {
    "contrastive": lambda: ops.contrastive(rows(5, 6).float(), rows(5, 6).float() + 1, 3.0),
    "sigmoid": lambda: ops.sigmoid_contrastive(rows(5, 6).float(), rows(5, 6).float() + 1, 3.0),
    "momentum": momentum,
    "cross_attention": attention,
    "cross_attention with weights": lambda: attention(return_probs=True),
    "word_patch_alignment": alignment,
    "matmul": lambda: ops.matmul(rows(5, 6).float(), rows(6, 7).float()),
}


@pytest.mark.parametrize("backend", ["", "reference"])
@pytest.mark.parametrize("name", SINGLE)
def test_operators_on_float32_keep_their_precision(monkeypatch, name, backend):
    monkeypatch.setenv("FASTVLP_BACKEND", backend)
    plain = SINGLE[name]()
    with torch.autocast("cpu", torch.bfloat16):
        inside = SINGLE[name]()
    assert inside.dtype == torch.float32
    assert torch.equal(inside, plain)
