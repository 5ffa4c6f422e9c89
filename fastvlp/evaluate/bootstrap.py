"""How far a share of right answers may lie from the true one, by resampling the queries."""

from __future__ import annotations

import numpy as np
from torch import Tensor


def share_interval(
    hits: Tensor, confidence: float = 0.95, *, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """The percentile bootstrap interval of the share of hits (Efron and Tibshirani 1993, ch. 13).

    Queries are drawn with replacement, as many as there are; the number of hits among them has a
    binomial distribution, from which it is drawn. Queries count as independent: several captions of
    one image are less than that, and the interval is then too narrow. Where all queries are hits,
    or none, the interval has no width.

    Args:
        hits: bool [queries], at least one.
        confidence: share of the resamples within the interval, between 0 and 1.
        resamples: how often is drawn.
        seed: of the draws; equal seeds give equal intervals.

    Returns:
        the lower and the upper end.

    Raises:
        ValueError: there is no query, or the confidence is out of range.

    Example:
        >>> import torch
        >>> share_interval(torch.arange(100) < 30)
        (0.21, 0.39)
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected more than 0 and less than 1, got {confidence}")
    count = len(hits)
    if not count:
        raise ValueError("hits: expected at least one query, got none")
    draws = np.random.default_rng(seed).binomial(
        count, int(hits.count_nonzero()) / count, resamples
    )
    ends = np.quantile(draws / count, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(ends[0]), float(ends[1])
