"""Random numbers that are functions of what they are for, not of those taken before.

A number depends on the seed, the epoch, the sample's place in the data set and its use. So a run
that is resumed, on however many ranks, takes the numbers that the unbroken run would have taken.
"""

from __future__ import annotations

import numpy as np

from fastvlp.splitmix import GOLDEN, mix, signed


def bits(seed: int, epoch: int, samples: np.ndarray, uses: int) -> np.ndarray:
    """uint64 ``[len(samples), uses]``, uniform and independent."""
    state = mix(np.array([signed(seed)]) + GOLDEN)
    state = mix(state ^ (np.array([signed(epoch)]) + GOLDEN))
    rows = mix(state ^ (np.asarray(samples).astype(np.int64) + GOLDEN))
    columns = np.arange(1, uses + 1) * GOLDEN
    return mix(rows[:, None] + columns).view(np.uint64)


def uniforms(seed: int, epoch: int, samples: np.ndarray, uses: int) -> np.ndarray:
    """float64 ``[len(samples), uses]`` in [0, 1)."""
    return (bits(seed, epoch, samples, uses) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(seed: int, epoch: int, stream: int, n: int) -> np.ndarray:
    """A permutation of ``range(n)``; different ``stream`` numbers give independent ones.

    Equal on every machine and with every version of numpy: an order by random keys.
    """
    # Far from the streams of single samples.
    keys = bits(seed ^ 0x5DEECE66D, epoch, np.array([stream]), n)[0]
    return np.argsort(keys, kind="stable")
