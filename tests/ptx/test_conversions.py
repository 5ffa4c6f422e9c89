"""cvt against its definition in rational arithmetic."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from ptx_machine.errors import UnknownForm
from ptx_machine.single import execute

RNG = np.random.default_rng(0)
INF, NAN = math.inf, math.nan
INTEGERS = [f"{sign}{bits}" for bits in (8, 16, 32, 64) for sign in "us"]
# Bits of the significand with the leading one, exponent of the least subnormal, largest value.
FORMATS = {
    "f16": (11, -24, 65504.0),
    "bf16": (8, -133, float.fromhex("0x1.fep127")),
    "f32": (24, -149, float(np.finfo(np.float32).max)),
    "f64": (53, -1074, float(np.finfo(np.float64).max)),
}


def limits(kind):
    bits = int(kind[1:])
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if kind[0] == "s" else (0, (1 << bits) - 1)


def patterns(kind):
    """Bit patterns of an integer type: ends of the ranges of all types, and random ones."""
    bits = int(kind[1:])
    found = {0, 1, 100}
    for at in (7, 8, 15, 16, 24, 25, 31, 32, 53, 54, 63, 64):
        found |= {(1 << at) - 1, 1 << at, (1 << at) + 1, -(1 << at) - 1}
    found |= {int(x) for x in RNG.integers(0, 1 << 63, 20, dtype=np.uint64)}
    return sorted({x % (1 << bits) for x in found})


def numbers(kind, bits):
    width = int(kind[1:])
    return [x - (1 << width) if kind[0] == "s" and x >> width - 1 else x for x in bits]


def held(kind, bits):
    """Registers for values of an integer type: those of 8 bits lie in wider ones."""
    return np.array(bits, f"u{max(2, int(kind[1:]) // 8)}")


def rounded(value, kind, mode):
    """A finite number rounded once to a floating-point format, as a Python float or exact."""
    if value == 0:
        return Fraction(0)
    digits, least, top = FORMATS[kind]
    exact = Fraction(value)
    exponent = math.floor(math.log2(abs(exact.numerator)) - math.log2(exact.denominator)) + 2
    while Fraction(2) ** exponent > abs(exact):
        exponent -= 1
    unit = Fraction(2) ** max(exponent - digits + 1, least)
    below = math.floor(exact / unit)
    rest = exact / unit - below
    up = {"rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and below % 2 == 1),
          "rz": rest > 0 and exact < 0, "rm": False, "rp": rest > 0}[mode]  # fmt: skip
    result = (below + up) * unit
    if abs(result) <= Fraction(top):
        return result
    stays = mode == "rz" or mode == ("rm" if exact > 0 else "rp")
    return math.copysign(top if stays else INF, 1 if exact > 0 else -1)


def float_of(kind, bits):
    if kind == "f16":
        return float(np.uint16(bits).view(np.float16))
    if kind == "bf16":
        return float((np.uint32(bits) << np.uint32(16)).view(np.float32))
    return float(bits)


@pytest.mark.parametrize("source", INTEGERS)
@pytest.mark.parametrize("target", INTEGERS)
def test_between_integers(source, target):
    """The low bits, extended by the sign or by zeros to the register; .sat clamps instead."""
    bits = patterns(source)
    register = max(16, int(target[1:]))
    for modifier in ("", ".sat"):
        text = f"cvt{modifier}.{target}.{source} d, a"
        got = execute(text, f"b{register}", a=held(source, bits))
        low, high = limits(target)
        for found, number in zip(got, numbers(source, bits), strict=True):
            if modifier:
                wanted = max(low, min(high, number))
            else:
                wanted = number % (1 << int(target[1:]))
                wanted = wanted - (1 << int(target[1:])) if wanted > high else wanted
            assert int(found) == wanted % (1 << register), (text, number)


def test_only_the_low_bits_of_a_wider_register_are_read():
    a = np.array([0xFFFF_FF80, 0x1234_567F, 0x0000_0180], np.uint32)
    assert execute("cvt.s32.s8 d, a", "b32", a=a).view(np.int32).tolist() == [-128, 127, -128]
    assert execute("cvt.u32.u8 d, a", "b32", a=a).tolist() == [128, 127, 128]
    assert execute("cvt.u16.u32 d, a", "b32", a=a).tolist() == [0xFF80, 0x567F, 0x180]


@pytest.mark.parametrize("source", INTEGERS[2:])
@pytest.mark.parametrize("target, mode", [("f16", "rn"), ("f64", "rn"), ("f32", "rn"),
                                          ("f32", "rz"), ("f32", "rm"), ("f32", "rp")])  # fmt: skip
def test_integers_to_floats(source, target, mode):
    bits = patterns(source)
    result = "b16" if target == "f16" else target
    got = execute(f"cvt.{mode}.{target}.{source} d, a", result, a=held(source, bits))
    for found, number in zip(got, numbers(source, bits), strict=True):
        assert float_of(target, found) == rounded(number, target, mode), (number, mode)


FLOAT_SAMPLES = [0.0, -0.0, 0.5, -0.5, 0.75, 1.5, 2.5, -1.5, -2.5, 1e-40, 127.5, 128.5, 255.5,
                 -128.5, 32767.5, 65535.5, 2.0**24 - 0.5, 2.0**31 - 1, 2.0**31, 2.0**32, -(2.0**31),
                 2.0**63, -(2.0**63), 2.0**64, 1e30, -1e30, INF, -INF]  # fmt: skip
NEAREST = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}


@pytest.mark.parametrize("mode", NEAREST)
@pytest.mark.parametrize("target", INTEGERS[2:])
@pytest.mark.parametrize("source", ["f16", "f32", "f64"])
def test_floats_to_integers(source, target, mode):
    """Clamped to the range of the type; NaN is 0, or the top bit alone where 64 bits take part."""
    dtype = {"f16": np.float16, "f32": np.float32, "f64": np.float64}[source]
    with np.errstate(over="ignore"):
        x = np.array([*FLOAT_SAMPLES, NAN, *(RNG.standard_normal(50) * 1000)]).astype(dtype)
    a = x.view(np.uint16) if source == "f16" else x
    got = execute(f"cvt.{mode}.{target}.{source} d, a", f"b{target[1:]}", a=a)
    low, high = limits(target)
    for found, value in zip(got, x.tolist(), strict=True):
        if math.isnan(value):
            wanted = 1 << int(target[1:]) - 1 if source == "f64" or target[1:] == "64" else 0
        elif math.isinf(value):
            wanted = high if value > 0 else low
        else:
            wanted = max(low, min(high, NEAREST[mode](value)))
        assert int(found) == wanted % (1 << int(target[1:])), (value, mode)


@pytest.mark.parametrize("mode", NEAREST)
@pytest.mark.parametrize("kind, dtype", [("f32", np.float32), ("f64", np.float64)])
def test_floats_to_whole_floats(mode, kind, dtype):
    x = np.array([*FLOAT_SAMPLES, *(RNG.standard_normal(50) * 10), NAN], dtype)
    got = execute(f"cvt.{mode}.{kind}.{kind} d, a", kind, a=x)
    for found, value in zip(got.tolist(), x.tolist(), strict=True):
        if math.isfinite(value):
            assert found == NEAREST[mode](value)
            assert math.copysign(1, found) == math.copysign(1, value)
        else:
            assert found == value or math.isnan(value) and math.isnan(found)


NARROWING = [
    ("f32", "f64", ("rn", "rz", "rm", "rp")),
    ("f16", "f32", ("rn", "rz")),
    ("bf16", "f32", ("rn", "rz")),
    ("f16", "f64", ("rn",)),
]


@pytest.mark.parametrize(
    "target, source, mode", [(t, s, mode) for t, s, modes in NARROWING for mode in modes]
)
def test_narrower_floats_are_rounded_once(target, source, mode):
    dtype = np.float32 if source == "f32" else np.float64
    digits, least, top = FORMATS[target]
    # Values of the format, ties between them, and what lies next to a tie; subnormal ones; the end.
    base = RNG.integers(1 << digits - 1, 1 << digits, 40)
    scale = 2.0 ** RNG.integers(-12, 4, 40)
    x = [(b + part) * s for b, s in zip(base, scale, strict=True)
         for part in (0, 0.25, 0.5, 0.5 + 2.0**-10, 0.75)]  # fmt: skip
    x += [2.0**least * part for part in (0.25, 0.5, 0.75, 1, 1.5, 2.5, 1000.5)]
    x += [top, top * (1 + 2.0 ** -(digits + 2))]
    if dtype == np.float64 or target == "f16":
        x += [top * (1 + 2.0**-digits), top * 1.5]
    x = np.array([*x, *(-v for v in x)]).astype(dtype)
    x = x[np.isfinite(x)]
    result = target if target == "f32" else "b16"
    got = execute(f"cvt.{mode}.{target}.{source} d, a", result, a=x)
    for found, value in zip(got, x.tolist(), strict=True):
        assert float_of(target, found) == rounded(value, target, mode), (value, mode)


def test_special_values_of_narrower_floats():
    x = np.array([0.0, -0.0, INF, -INF, NAN], np.float32)
    for kind, infinity in (("f16", 0x7C00), ("bf16", 0x7F80)):
        got = execute(f"cvt.rn.{kind}.f32 d, a", "b16", a=x)
        assert got.tolist() == [0, 0x8000, infinity, infinity | 0x8000, 0x7FFF]
    got = execute("cvt.rn.f32.f64 d, a", "f32", a=x.astype(np.float64)).view(np.uint32)
    assert got.tolist() == [0, 0x80000000, 0x7F800000, 0xFF800000, 0x7FFFFFFF]


@pytest.mark.parametrize("source", ["f16", "bf16"])
def test_wider_floats_are_exact(source):
    bits = np.arange(1 << 16, dtype=np.uint16)
    got = execute(f"cvt.f32.{source} d, a", "f32", a=bits)
    if source == "f16":
        wanted = bits.view(np.float16).astype(np.float32)
    else:
        wanted = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    np.testing.assert_array_equal(got, wanted)
    signs = np.signbit(got) == np.signbit(wanted)
    assert (signs | np.isnan(wanted)).all()
    x = np.array([*FLOAT_SAMPLES, NAN], np.float32)
    got = execute("cvt.f64.f32 d, a", "f64", a=x)
    np.testing.assert_array_equal(got, x.astype(np.float64))


def test_pairs_have_the_first_operand_in_the_upper_half():
    a, b = np.array(list(itertools.product(FLOAT_SAMPLES[:12], repeat=2)), np.float32).T.copy()
    for kind, modes in (("f16", ("rn", "rz")), ("bf16", ("rn", "rz"))):
        for mode in modes:
            got = execute(f"cvt.{mode}.{kind}x2.f32 d, a, b", "b32", a=a, b=b)
            high = execute(f"cvt.{mode}.{kind}.f32 d, a", "b16", a=a).astype(np.uint32)
            low = execute(f"cvt.{mode}.{kind}.f32 d, a", "b16", a=b)
            np.testing.assert_array_equal(got, high << np.uint32(16) | low)
    got = execute("cvt.rn.relu.bf16x2.f32 d, a, b", "b32", a=a, b=b)
    wanted = execute("cvt.rn.bf16x2.f32 d, a, b", "b32", a=np.maximum(a, 0), b=np.maximum(b, 0))
    np.testing.assert_array_equal(got & 0x7FFF7FFF, wanted & 0x7FFF7FFF)


def test_saturation_and_flushing():
    x = np.array([-INF, -2.0, -0.0, 0.25, 1.0, 7.0, INF, NAN], np.float32)
    got = execute("cvt.sat.f32.f32 d, a", "f32", a=x)
    np.testing.assert_array_equal(got, np.float32([0, 0, 0, 0.25, 1, 1, 1, 0]))
    got = execute("cvt.ftz.f32.f32 d, a", "f32", a=np.float32([1e-40, -1e-40, 1.0]))
    assert got.view(np.uint32).tolist() == [0, 0x80000000, 0x3F800000]
    got = execute("cvt.rzi.ftz.s32.f32 d, a", "b32", a=np.float32([1e-40, 2.5]))
    assert got.tolist() == [0, 2]


@pytest.mark.parametrize(
    "text",
    ["cvt.f32.f64 d, a", "cvt.s32.f64 d, a", "cvt.rn.s32.f64 d, a", "cvt.rn.s64.s64 d, a"],
)
def test_roundings_are_neither_left_out_nor_added(text):
    with pytest.raises(UnknownForm):
        execute(text, "f32", a=np.zeros(2))


def test_tf32_is_the_nearest_and_ties_go_away_from_zero():
    step = 2.0**-10
    x = np.array([1 + step / 2, 1 + step / 2 - 2.0**-23, -1 - step / 2, 3, 0, np.inf], np.float32)
    got = execute("cvt.rna.tf32.f32 d, a", "f32", a=x.view(np.uint32))
    assert got.tolist() == [1 + step, 1, -1 - step, 3, 0, np.inf]
    nan = np.array([np.nan], np.float32).view(np.uint32)
    assert np.isnan(execute("cvt.rna.tf32.f32 d, a", "f32", a=nan)).all()
