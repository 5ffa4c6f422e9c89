"""Sums and products rounded once, as IEEE 754 asks of a fused multiply-add, in each direction."""

from fractions import Fraction

import numpy as np

# Below this, float32 results may be subnormal and have fewer bits.
_SMALLEST_NORMAL = 2.0**-126


def two_sum(a, b):
    """(s, e) with s = a + b rounded and s + e = a + b exactly, unless something overflows."""
    s = a + b
    rest = s - a
    return s, (a - (s - rest)) + (b - rest)


def to_odd(s, error):
    """The float64 s, moved to its neighbour with an odd significand where s is not exact.

    Rounding that to fewer bits by at least two gives what rounding s + error once would give.
    """
    bits = s.view(np.uint64)
    even = (error != 0) & (bits & np.uint64(1) == 0) & np.isfinite(s)
    return np.where(even, np.nextafter(s, np.where(error > 0, np.inf, -np.inf)), s)


def to_float32(s, error, mode: str):
    """s + error (float64, |error| at most half a unit of s) in float32, rounded once by mode."""
    if mode == "rn":
        return to_odd(s, error).astype(np.float32)
    near = s.astype(np.float32)
    # The sign of the exact value less the nearest one.
    off = s - near.astype(np.float64)
    off = np.where(off == 0, error, off)
    down = {"rm": off < 0, "rp": False, "rz": (off < 0) & (near > 0)}[mode]
    up = {"rm": False, "rp": off > 0, "rz": (off > 0) & (near < 0)}[mode]
    near = np.where(down, np.nextafter(near, np.float32(-np.inf)), near)
    return np.where(up, np.nextafter(near, np.float32(np.inf)), near)


def fma32(a, b, c, mode: str = "rn"):
    """a * b + c for float32 in one rounding."""
    product = a.astype(np.float64) * b.astype(np.float64)
    addend = c.astype(np.float64)
    s = np.asarray(product + addend)
    if mode == "rn":
        # Rounding twice goes wrong only where the first result lies half way between two float32
        # values, or has no more bits than those of a subnormal.
        halfway = s.view(np.uint64) & np.uint64(0x1FFFFFFF) == np.uint64(0x10000000)
        tiny = np.abs(s) < _SMALLEST_NORMAL
        if not (halfway | tiny).any():
            return s.astype(np.float32)
    s, error = two_sum(product, addend)
    error = np.where(np.isfinite(s), error, 0.0)
    return _signed_zero(to_float32(s, error, mode), s == 0, product, addend, mode)


def add32(a, b, mode: str = "rn"):
    """a + b for float32 in one rounding."""
    if mode == "rn":
        return a + b
    x, y = a.astype(np.float64), b.astype(np.float64)
    s, error = two_sum(x, y)
    error = np.where(np.isfinite(s), error, 0.0)
    return _signed_zero(to_float32(s, error, mode), s == 0, x, y, mode)


def multiply32(a, b, mode: str = "rn"):
    """a * b for float32 in one rounding."""
    if mode == "rn":
        return a * b
    return to_float32(a.astype(np.float64) * b.astype(np.float64), np.float64(0), mode)


def _signed_zero(result, zero, x, y, mode):
    """Terms that cancel leave +0, but -0 when rounding down."""
    if mode != "rm":
        return result
    return np.where(zero & (np.signbit(x) != np.signbit(y)), np.float32(-0.0), result)


def _split(a):
    """a as two halves whose products are exact."""
    t = a * 134217729.0
    high = t - (t - a)
    return high, a - high


def _two_product(a, b):
    p = a * b
    (a1, a0), (b1, b0) = _split(a), _split(b)
    return p, a0 * b0 - (((p - a1 * b1) - a0 * b1) - a1 * b0)


def fma64(a, b, c):
    """a * b + c for float64 in one rounding to nearest (Boldo and Melquiond's algorithm).

    Where magnitudes could leave the range of the exact steps, exact rational arithmetic.
    """
    a, b, c = (np.atleast_1d(x) for x in np.broadcast_arrays(a, b, c))
    high, low = _two_product(a, b)
    t, t_low = two_sum(c, low)
    v, v_low = two_sum(high, t)
    odd, odd_error = two_sum(t_low, v_low)
    result = v + to_odd(odd, odd_error)

    def risky(x):
        size = np.abs(x)
        return np.isfinite(x) & (x != 0) & ((size > 2.0**500) | (size < 2.0**-450))

    special = ~(np.isfinite(a) & np.isfinite(b) & np.isfinite(c))
    result = np.where(special | (a == 0) | (b == 0), a * b + c, result)
    for i in np.flatnonzero((risky(a) | risky(b) | risky(c)) & ~special & (a != 0) & (b != 0)):
        exact = Fraction(a[i]) * Fraction(b[i]) + Fraction(c[i])
        result[i] = _nearest(exact, np.copysign(0.0, a[i] * b[i] + c[i]))
    return result


def _nearest(exact: Fraction, zero: float) -> float:
    try:
        return float(exact) if exact else zero
    except OverflowError:
        return np.inf if exact > 0 else -np.inf
