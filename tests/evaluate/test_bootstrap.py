"""Bootstrap intervals: their ends, their width, their seed."""

import numpy as np
import pytest
import torch

from fastvlp.evaluate.bootstrap import share_interval


def test_ends_are_those_of_resampled_queries():
    """Against the procedure as it is described, with draws of queries of its own."""
    hits = torch.arange(60) % 3 == 0
    rng = np.random.default_rng(1)
    shares = hits.numpy()[rng.integers(0, 60, (20_000, 60))].mean(1)
    wanted = np.quantile(shares, [0.025, 0.975])
    # A query more or less, which is the grain of the distribution.
    assert share_interval(hits) == pytest.approx(wanted, abs=1 / 60 + 1e-9)


def test_more_queries_and_less_confidence_are_narrower():
    few, many = torch.arange(50) < 20, torch.arange(5000) < 2000

    def width(*given):
        low, high = share_interval(*given)
        return high - low

    assert width(many) < width(few) / 5 and width(few, 0.5) < width(few, 0.99)
    assert share_interval(few) == share_interval(few)
    assert share_interval(torch.ones(5).bool()) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("hits", "confidence", "message"),
    [(torch.ones(3).bool(), 1.0, "confidence"), (torch.ones(0).bool(), 0.9, "hits: expected at l")],
)
def test_mistakes_are_named(hits, confidence, message):
    with pytest.raises(ValueError, match=message):
        share_interval(hits, confidence)
