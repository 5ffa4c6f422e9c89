"""Losses and gradients of pairs from log-sum-exps over negatives."""

import math

import pytest
import torch

from fastvlp.ops.contrastive.pairs import log_sum_exp, pair_losses, positive_gradient

INF, NAN = math.inf, math.nan
DIFFERENCES = [-INF, -80.0, -40.0, -20.0, -1e-3, 0.0, 1.0, 20.0, 39.0, 41.0, 1000.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_relatively_exact_at_any_distance(dtype):
    negatives = torch.tensor(DIFFERENCES, dtype=dtype)
    positive = torch.zeros(len(negatives), dtype=dtype)
    expected = [max(d, 0.0) + math.log1p(math.exp(-abs(d))) for d in DIFFERENCES]
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 0}
    torch.testing.assert_close(
        pair_losses(negatives, positive), torch.tensor(expected, dtype=dtype), **tolerance
    )
    missing = [0.0 if d == -INF else 1 / (1 + math.exp(-d)) for d in DIFFERENCES]
    found = positive_gradient(negatives, negatives[:0], positive, 0.5)
    tolerance["atol"] = torch.finfo(dtype).tiny
    torch.testing.assert_close(found, -0.5 * torch.tensor(missing, dtype=dtype), **tolerance)


def test_directions_without_a_loss_are_left_out():
    negatives, positive, none = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0]), torch.empty(0)
    both = positive_gradient(negatives, 2 * negatives, positive, 1.0)
    parts = [positive_gradient(*pair, positive, 1.0) for pair in
             ((negatives, none), (none, 2 * negatives))]  # fmt: skip
    assert torch.equal(both, sum(parts))
    assert log_sum_exp(none, positive).shape == (0,)
    expected = torch.stack((negatives, positive)).logsumexp(0)
    torch.testing.assert_close(log_sum_exp(negatives, positive), expected)


def test_no_pairs():
    none = torch.empty(0)
    assert positive_gradient(none, none, none, 1.0).shape == pair_losses(none, none).shape == (0,)


@pytest.mark.parametrize("positive", [NAN, INF, -INF])
def test_a_logit_that_is_not_finite_is_no_loss_of_0(positive):
    assert pair_losses(torch.tensor([-INF, 3.0]), torch.full((2,), positive)).isnan().all()
