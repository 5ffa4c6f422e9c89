"""Random numbers that are functions of what they are for, not of those taken before.

A number depends on the seed, the epoch, the sample's place in the data set and its use. So a run
that is resumed, on however many ranks, takes the numbers that the unbroken run would have taken.
"""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    # The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every bit depends on every bit.
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def bits(seed: int, epoch: int, samples: np.ndarray, uses: int) -> np.ndarray:
    """uint64 ``[len(samples), uses]``, uniform and independent."""
    with np.errstate(over="ignore"):
        state = _mix(np.array([seed % 2**64], np.uint64) + _GOLDEN)
        state = _mix(state ^ (np.uint64(epoch % 2**64) + _GOLDEN))
        rows = _mix(state ^ (np.asarray(samples).astype(np.uint64) + _GOLDEN))
        columns = np.arange(1, uses + 1, dtype=np.uint64) * _GOLDEN
        return _mix(rows[:, None] + columns)


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
