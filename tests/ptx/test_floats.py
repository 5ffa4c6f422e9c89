"""Floating-point instructions against their definitions in rational arithmetic."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from ptx_machine.single import execute

RNG = np.random.default_rng(0)
INF, NAN = math.inf, math.nan
# Zeros, subnormal values, the ends of the normal range, halves of a unit, and infinities.
SPECIAL = {
    np.float32: [0.0, -0.0, 1e-45, -1e-45, 5e-39, 2.0**-126, -(2.0**-126), 1.0, -1.0, 1.5,
                 1 + 2.0**-23, 1 - 2.0**-24, 2.0**24 + 2, 3.4e38, -3.4e38, INF, -INF],
    np.float64: [0.0, -0.0, 5e-324, 2.0**-1022, 1.0, -1.0, 1 + 2.0**-52, 1 - 2.0**-53, 1e300,
                 -1e300, 1e-300, INF, -INF],
}  # fmt: skip
MODES = ["rn", "rz", "rm", "rp"]


def samples(dtype, sampled):
    spread = 2.0 ** RNG.integers(-40, 40, sampled)
    with_halves = np.concatenate([SPECIAL[dtype], RNG.standard_normal(sampled) * spread])
    return with_halves.astype(dtype)


def grid(dtype, arity, sampled):
    return np.array(list(itertools.product(samples(dtype, sampled), repeat=arity)), dtype).T.copy()


def rounded(exact: Fraction, dtype, mode: str):
    """An exact value other than zero rounded once: `float` rounds to nearest even, and the
    neighbours of the result are one unit away."""
    top = float(np.finfo(dtype).max)
    digits, least = (24, -149) if dtype == np.float32 else (53, -1074)
    size, sign = abs(exact), 1 if exact > 0 else -1
    # The unit of the last place of `exact`, by its binary exponent.
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if Fraction(2) ** exponent > size:
        exponent -= 1
    unit = Fraction(2) ** max(exponent - digits + 1, least)
    below = math.floor(exact / unit)
    rest = exact / unit - below
    away = {"rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and below % 2 == 1),
            "rz": rest > 0 and exact < 0, "rm": False, "rp": rest > 0}[mode]  # fmt: skip
    result = (below + away) * unit
    if abs(result) > top:
        stays = mode == "rz" or (mode == "rm" and exact > 0) or (mode == "rp" and exact < 0)
        return sign * (top if stays else INF)
    return math.copysign(float(result), sign)


def same(found, wanted):
    if math.isnan(wanted):
        return math.isnan(found)
    return found == wanted and math.copysign(1, found) == math.copysign(1, wanted)


def check(instruction, dtype, mode, exact, plain, operands):
    """`exact` of fractions, rounded by `mode`; where that has no answer (infinities, NaN), `plain`
    of the host's floats."""
    names = "abc"[: len(operands)]
    kind = "f32" if dtype == np.float32 else "f64"
    got = execute(f"{instruction} d, {', '.join(names)}", kind,
                  **dict(zip(names, operands, strict=True)))  # fmt: skip
    for found, row in zip(got.tolist(), zip(*operands.tolist(), strict=True), strict=True):
        if all(map(math.isfinite, row)) and (value := exact(*map(Fraction, row))) != 0:
            wanted = rounded(value, dtype, mode)
        else:
            wanted = plain(*row)
        assert same(found, wanted), (instruction, row, found, wanted)


def signed_sum(mode):
    """The host's sum of special values; terms that cancel are -0 when rounding down."""

    def total(x, y):
        result = x + y
        if result == 0 and x != 0 and mode == "rm":
            return -0.0
        if result == 0 and math.copysign(1, x) != math.copysign(1, y) and mode == "rm":
            return -0.0
        return result

    return total


FORMATS = [(np.float32, mode) for mode in MODES] + [(np.float64, "rn")]


@pytest.mark.parametrize("dtype, mode", FORMATS)
def test_sums_and_products_are_rounded_once(dtype, mode):
    kind = "f32" if dtype == np.float32 else "f64"
    operands = grid(dtype, 2, 12)
    total = signed_sum(mode)
    check(f"add.{mode}.{kind}", dtype, mode, lambda x, y: x + y, total, operands)
    check(f"sub.{mode}.{kind}", dtype, mode, lambda x, y: x - y, lambda x, y: total(x, -y),
          operands)  # fmt: skip
    check(f"mul.{mode}.{kind}", dtype, mode, lambda x, y: x * y, lambda x, y: x * y, operands)


def test_the_rounding_may_be_left_out():
    a, b = grid(np.float32, 2, 12)
    with np.errstate(all="ignore"):
        for name, wanted in (("add", a + b), ("sub", a - b), ("mul", a * b)):
            np.testing.assert_array_equal(execute(f"{name}.f32 d, a, b", "f32", a=a, b=b), wanted)


@pytest.mark.parametrize("dtype, mode", FORMATS)
def test_fused_products_are_rounded_once(dtype, mode):
    kind = "f32" if dtype == np.float32 else "f64"
    total = signed_sum(mode)
    check(f"fma.{mode}.{kind}", dtype, mode, lambda x, y, z: x * y + z,
          lambda x, y, z: total(x * y, z), grid(dtype, 3, 1))  # fmt: skip
    # Products that nearly cancel, and ties between two values.
    a, b = (RNG.standard_normal(400).astype(dtype) for _ in range(2))
    c = -(a * b)
    ties = np.array([[1 + np.finfo(dtype).eps] * 2, [1, -1], [np.finfo(dtype).eps / 4] * 2], dtype)
    operands = np.concatenate([np.stack([a, b, c]), ties], axis=1)
    check(f"fma.{mode}.{kind}", dtype, mode, lambda x, y, z: x * y + z,
          lambda x, y, z: total(x * y, z), operands)  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_quotients_and_roots_are_rounded_once(dtype):
    kind = "f32" if dtype == np.float32 else "f64"
    a, b = grid(dtype, 2, 12)
    finite = (b != 0) & np.isfinite(a) & np.isfinite(b)
    check(f"div.rn.{kind}", dtype, "rn", lambda x, y: x / y, lambda x, y: x / y,
          np.stack([a[finite], b[finite]]))  # fmt: skip
    a, b = a[~finite], b[~finite]
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(execute(f"div.rn.{kind} d, a, b", kind, a=a, b=b), a / b)
    x = samples(dtype, 200)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(execute(f"sqrt.rn.{kind} d, a", kind, a=x), np.sqrt(x))
        np.testing.assert_array_equal(execute(f"rcp.rn.{kind} d, a", kind, a=x), 1 / x)


# Name, the true function, the error that the ISA allows: relative, or absolute where stated.
APPROXIMATE = [
    ("ex2.approx.f32", lambda x: 2.0**x, np.linspace(-120, 120, 500), 2.0**-22, 0),
    ("ex2.approx.ftz.f32", lambda x: 2.0**x, np.linspace(-120, 120, 500), 2.0**-22, 0),
    ("lg2.approx.f32", math.log2, 2.0 ** np.linspace(-100, 100, 500), 2.0**-22, 2.0**-22),
    ("rcp.approx.ftz.f32", lambda x: 1 / x, 2.0 ** np.linspace(-100, 100, 500), 2.0**-23, 0),
    ("rsqrt.approx.f32", lambda x: x**-0.5, 2.0 ** np.linspace(-100, 100, 500), 2.0**-22.9, 0),
    ("sqrt.approx.f32", math.sqrt, 2.0 ** np.linspace(-100, 100, 500), 2.0**-23, 0),
    ("sin.approx.f32", math.sin, np.linspace(-3, 3, 500), 0, 2.0**-20.5),
    ("cos.approx.f32", math.cos, np.linspace(-3, 3, 500), 0, 2.0**-20.5),
    ("tanh.approx.f32", math.tanh, np.linspace(-10, 10, 500), 2.0**-11, 0),
    ("rcp.approx.ftz.f64", lambda x: 1 / x, 2.0 ** np.linspace(-900, 900, 500), 2.0**-20, 0),
]


@pytest.mark.parametrize("name, function, points, relative, absolute", APPROXIMATE)
def test_approximations_stay_within_what_the_isa_allows(name, function, points, relative, absolute):
    kind = name[-3:]
    x = points.astype(np.float32 if kind == "f32" else np.float64)
    got = execute(f"{name} d, a", kind, a=x).astype(np.float64)
    wanted = np.array([function(float(v)) for v in x])
    assert (np.abs(got - wanted) <= relative * np.abs(wanted) + absolute).all()


@pytest.mark.parametrize(
    "name, points, wanted",
    [
        ("ex2.approx.f32", [-INF, -0.0, 0.0, INF, NAN], [0.0, 1.0, 1.0, INF, NAN]),
        ("lg2.approx.f32", [-INF, -1.0, -0.0, 0.0, INF, NAN], [NAN, NAN, -INF, -INF, INF, NAN]),
        ("rcp.approx.f32", [-INF, -0.0, 0.0, INF, NAN], [-0.0, -INF, INF, 0.0, NAN]),
        ("rsqrt.approx.f32", [-INF, -1.0, -0.0, 0.0, INF], [NAN, NAN, -INF, INF, 0.0]),
        ("sqrt.approx.f32", [-INF, -1.0, -0.0, 0.0, INF], [NAN, NAN, -0.0, 0.0, INF]),
        ("tanh.approx.f32", [-INF, -0.0, 0.0, INF, NAN], [-1.0, -0.0, 0.0, 1.0, NAN]),
        ("sin.approx.f32", [-INF, -0.0, 0.0, INF], [NAN, -0.0, 0.0, NAN]),
        ("cos.approx.f32", [-INF, -0.0, 0.0, INF], [NAN, 1.0, 1.0, NAN]),
    ],
)
def test_approximations_of_special_values(name, points, wanted):
    got = execute(f"{name} d, a", "f32", a=np.array(points, np.float32))
    for found, value in zip(got.tolist(), wanted, strict=True):
        assert same(found, value), (name, got)


def test_divisions_by_an_approximate_reciprocal():
    a, b = RNG.standard_normal((2, 500)).astype(np.float32)
    for name in ("div.approx.f32", "div.full.f32", "div.full.ftz.f32"):
        got = execute(f"{name} d, a, b", "f32", a=a, b=b).astype(np.float64)
        wanted = a.astype(np.float64) / b
        assert (np.abs(got - wanted) <= 2.0**-21 * np.abs(wanted)).all()


def test_an_approximate_division_loses_divisors_above_2_to_the_126():
    top = 2.0**127
    a = np.float32([top, top, -1, 1, INF, -INF, 1, INF, NAN])
    b = np.float32([2.0**126, 1.5 * 2.0**126, top, -top, top, -top, INF, INF, top])
    true = [2.0, 4 / 3, -1 / top, -1 / top, INF, INF, 0.0, NAN, NAN]
    for ftz in ("", ".ftz"):
        lost = [2.0, 0.0, -0.0, -0.0, NAN, NAN, 0.0, NAN, NAN]
        got = execute(f"div.approx{ftz}.f32 d, a, b", "f32", a=a, b=b).tolist()
        assert all(map(same, got, lost)), got
    full = execute("div.full.f32 d, a, b", "f32", a=a, b=b)
    assert all(map(same, full.tolist(), np.float32(true).tolist())), full


@pytest.mark.parametrize("kind, dtype", [("f32", np.float32), ("f64", np.float64)])
def test_extremes(kind, dtype):
    """A number wins over NaN; of two zeros -0 is the smaller one."""
    a, b = np.array(list(itertools.product([*SPECIAL[dtype], NAN], repeat=2)), dtype).T.copy()

    def order(x):
        return x, math.copysign(1, x)

    for name, pick in (("min", min), ("max", max)):
        got = execute(f"{name}.{kind} d, a, b", kind, a=a, b=b)
        for found, x, y in zip(got.tolist(), a.tolist(), b.tolist(), strict=True):
            numbers = [v for v in (x, y) if not math.isnan(v)]
            wanted = pick(numbers, key=order) if numbers else NAN
            assert same(found, wanted), (name, x, y)
    nan = execute("max.NaN.f32 d, a, b", "f32", a=np.float32([1, NAN]), b=np.float32([NAN, 2]))
    assert nan.view(np.uint32).tolist() == [0x7FFFFFFF] * 2
    both = execute("min.f32 d, a, b", "f32", a=np.float32([NAN]), b=np.float32([NAN]))
    assert both.view(np.uint32).tolist() == [0x7FFFFFFF]


def test_subnormal_values_are_flushed_where_asked():
    tiny, one = np.float32([1e-39, -1e-39, 2.0**-126]), np.float32([1, 1, 0.5])
    got = execute("mul.ftz.f32 d, a, b", "f32", a=tiny, b=one)
    assert [math.copysign(1, x) for x in got] == [1, -1, 1] and not got.any()
    assert execute("mul.f32 d, a, b", "f32", a=tiny, b=one).all()
    assert not execute("fma.rn.ftz.f32 d, a, b, c", "f32", a=tiny, b=one, c=0 * one).any()
    assert not execute("add.ftz.f32 d, a, b", "f32", a=tiny[:2], b=-0.0 * one[:2]).any()
    assert execute("max.ftz.f32 d, a, b", "f32", a=tiny[:1], b=-one[:1]) == 0


def test_results_are_saturated_where_asked():
    a = np.float32([-INF, -2.0, -0.0, 0.25, 1.0, 3.0, INF, NAN])
    got = execute("add.sat.f32 d, a, b", "f32", a=a, b=np.zeros_like(a))
    np.testing.assert_array_equal(got, np.float32([0, 0, 0, 0.25, 1, 1, 1, 0]))
    got = execute("fma.rn.sat.f32 d, a, b, c", "f32", a=a, b=np.ones_like(a), c=np.ones_like(a))
    np.testing.assert_array_equal(got, np.float32([0, 0, 1, 1, 1, 1, 1, 0]))


@pytest.mark.parametrize("kind, dtype", [("f32", np.float32), ("f64", np.float64)])
def test_signs(kind, dtype):
    a = np.array([*SPECIAL[dtype], NAN], dtype)
    for name, wanted in (("neg", -a), ("abs", np.abs(a))):
        got = execute(f"{name}.{kind} d, a", kind, a=a)
        assert all(map(same, got.tolist(), wanted.tolist()))
