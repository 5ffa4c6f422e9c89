"""SplitMix64 on signed integers, the only ones of 64 bits that torch computes with.

A counter-based generator (Steele, Lea and Flood 2014): `mix(key + counter * GOLDEN)` is a random
number for each counter, the same on every machine and device.
"""

from typing import TypeVar

import numpy as np
import torch

Integers = TypeVar("Integers", np.ndarray, torch.Tensor)

GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed number, like the two below
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def mix(x: Integers) -> Integers:
    """int64 of any shape: the finaliser, in which every bit depends on every bit."""
    x = (x ^ shift(x, 30)) * _MIX_1
    x = (x ^ shift(x, 27)) * _MIX_2
    return x ^ shift(x, 31)


def shift(x: Integers, bits: int) -> Integers:
    """To the right, zeros coming in (a signed number's own shift repeats the sign)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def signed(number: int) -> int:
    """The lowest 64 bits as a signed number."""
    return ((number + 2**63) % 2**64) - 2**63
