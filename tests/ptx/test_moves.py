"""mov, selp and setp against their definitions."""

import itertools
import math
import operator

import numpy as np
import pytest
from ptx_machine.errors import ProgramError, UnknownForm
from ptx_machine.single import execute

RNG = np.random.default_rng(0)


def words(bits, count=64):
    return RNG.integers(0, 2**63, count, dtype=np.uint64).astype(f"u{bits // 8}")


def test_moves_copy_bits():
    for kind, values in (
        ("b16", words(16)), ("u32", words(32)), ("s64", words(64)), ("b32", words(32)),
    ):  # fmt: skip
        bits = kind[1:]
        got = execute(f"mov.{kind} d, a", f"b{bits}", a=values)
        np.testing.assert_array_equal(got, values)
    nan = np.array([0x7FA12345, 0xFFC00001], np.uint32).view(np.float32)
    got = execute("mov.f32 d, a", "f32", a=nan)
    np.testing.assert_array_equal(got.view(np.uint32), nan.view(np.uint32))
    p = RNG.random(40) < 0.5
    np.testing.assert_array_equal(execute("mov.pred d, a", "pred", a=p), p)


def test_constants():
    thread = np.zeros(2, np.uint32)
    for text, kind, wanted in (
        ("mov.u32 d, -1", "b32", 0xFFFFFFFF), ("mov.b32 d, 0x7F", "b32", 0x7F),
        ("mov.u32 d, 0b101", "b32", 5), ("mov.u64 d, -2", "b64", 2**64 - 2),
        ("mov.b16 d, 65535", "b16", 65535), ("mov.u16 d, -3", "b16", 65533),
        ("mov.f32 d, 0f3FC00000", "f32", 1.5), ("mov.f64 d, 0dBFF8000000000000", "f64", -1.5),
        ("mov.u32 d, 017", "b32", 15), ("mov.pred d, 1", "pred", True),
    ):  # fmt: skip
        assert (execute(text, kind, a=thread) == wanted).all(), text


def test_parts_of_a_register_come_lowest_first():
    wide, narrow = words(64), words(32)
    low, high = execute("mov.b64 {d, e}, a", ("b32", "b32"), a=wide)
    np.testing.assert_array_equal(low, wide.astype(np.uint32))
    np.testing.assert_array_equal(high, (wide >> np.uint64(32)).astype(np.uint32))
    np.testing.assert_array_equal(execute("mov.b64 d, {a, b}", "b64", a=low, b=high), wide)
    low, high = execute("mov.b32 {d, e}, a", ("b16", "b16"), a=narrow)
    np.testing.assert_array_equal(low, narrow.astype(np.uint16))
    np.testing.assert_array_equal(execute("mov.b32 d, {a, b}", "b32", a=low, b=high), narrow)
    parts = execute("mov.b64 {d, e, f, g}, a", ("b16",) * 4, a=wide)
    np.testing.assert_array_equal(np.stack(parts, 1), wide.view(np.uint16).reshape(-1, 4))
    # A constant among the parts, and a part that nobody wants.
    got = execute("mov.b32 d, {0, a}", "b32", a=high)
    np.testing.assert_array_equal(got, high.astype(np.uint32) << np.uint32(16))
    np.testing.assert_array_equal(
        execute("mov.b64 {_, d}, a", "b32", a=wide), wide >> np.uint64(32)
    )


@pytest.mark.parametrize("kind, register", [("b16", "u2"), ("s32", "u4"), ("b64", "u8")])
def test_selection(kind, register):
    a, b, p = words(8 * int(register[1])), words(8 * int(register[1])), RNG.random(64) < 0.5
    result = f"b{8 * int(register[1])}"
    got = execute(f"selp.{kind} d, a, b, p", result, a=a, b=b, p=p)
    np.testing.assert_array_equal(got, np.where(p, a, b))
    got = execute("selp.f32 d, a, 0f3F800000, p", "f32", a=np.float32(a % 7), p=p)
    np.testing.assert_array_equal(got, np.where(p, np.float32(a % 7), np.float32(1)))


ORDERS = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le,
    "gt": operator.gt, "ge": operator.ge,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("name", ORDERS)
def test_comparisons_of_integers(name, kind):
    bits = int(kind[1:])
    ends = [0, 1, (1 << bits - 1) - 1, 1 << bits - 1, (1 << bits) - 1]
    a, b = np.array(list(itertools.product(ends, repeat=2)), f"u{bits // 8}").T.copy()
    p, q = execute(f"setp.{name}.{kind} d|e, a, b", ("pred", "pred"), a=a, b=b)
    dtype = f"{'i' if kind[0] == 's' else 'u'}{bits // 8}"
    wanted = ORDERS[name](a.view(dtype), b.view(dtype))
    np.testing.assert_array_equal(p, wanted)
    np.testing.assert_array_equal(q, ~wanted)


def test_names_of_unsigned_comparisons():
    a, b = np.array([0, 1, 2**31, 2**32 - 1], np.uint32), np.full(4, 2**31, np.uint32)
    for name, order in (("lo", "lt"), ("ls", "le"), ("hi", "gt"), ("hs", "ge")):
        got = execute(f"setp.{name}.u32 d, a, b", "pred", a=a, b=b)
        np.testing.assert_array_equal(got, ORDERS[order](a, b))
    for name in ("eq", "ne"):
        got = execute(f"setp.{name}.b32 d, a, b", "pred", a=a, b=b)
        np.testing.assert_array_equal(got, ORDERS[name](a, b))


FLOATS = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e-40]


@pytest.mark.parametrize("kind, dtype", [("f32", np.float32), ("f64", np.float64)])
@pytest.mark.parametrize("name", [*ORDERS, *(f"{n}u" for n in ORDERS), "num", "nan"])
def test_comparisons_of_floats(name, kind, dtype):
    """Ordered comparisons are false of NaN, unordered ones true."""
    a, b = np.array(list(itertools.product(FLOATS, repeat=2)), dtype).T.copy()
    got = execute(f"setp.{name}.{kind} d, a, b", "pred", a=a, b=b)
    for found, x, y in zip(got.tolist(), a.tolist(), b.tolist(), strict=True):
        nan = math.isnan(x) or math.isnan(y)
        if name in ("num", "nan"):
            wanted = nan == (name == "nan")
        elif name in ORDERS:
            wanted = not nan and ORDERS[name](x, y)
        else:
            wanted = nan or ORDERS[name[:-1]](x, y)
        assert found == wanted, (name, x, y)


def test_comparisons_combine_with_a_predicate():
    a, b = np.array([[1, 2], [2, 1], [1, 2], [2, 1]], np.uint32).T.copy()
    c = np.array([False, False, True, True])
    for name, join in (("and", operator.and_), ("or", operator.or_), ("xor", operator.xor)):
        p, q = execute(f"setp.lt.{name}.u32 d|e, a, b, c", ("pred",) * 2, a=a, b=b, c=c)
        np.testing.assert_array_equal(p, join(a < b, c))
        np.testing.assert_array_equal(q, join(~(a < b), c))
        p = execute(f"setp.lt.{name}.u32 d, a, b, !c", "pred", a=a, b=b, c=c)
        np.testing.assert_array_equal(p, join(a < b, ~c))


def test_comparisons_flush_subnormal_values_where_asked():
    a, b = np.float32([1e-40, -1e-40]), np.float32([0, 0])
    assert execute("setp.eq.ftz.f32 d, a, b", "pred", a=a, b=b).all()
    assert not execute("setp.eq.f32 d, a, b", "pred", a=a, b=b).any()


def test_guards_choose_lanes():
    a, p = words(32), RNG.random(64) < 0.5
    # d is unwritten where the guard fails: the other half of the lanes writes it in turn.
    text = "@p mov.u32 d, a; @!p mov.u32 d, 7"
    np.testing.assert_array_equal(execute(text, "b32", a=a, p=p), np.where(p, a, 7))


def test_wrong_uses_are_errors():
    a = words(32)
    with pytest.raises(UnknownForm):
        execute("mov.u64 d, a", "b64", a=a)  # of another width
    with pytest.raises(UnknownForm):
        execute("setp.lo.s32 d, a, a", "pred", a=a)
    with pytest.raises(UnknownForm):
        execute("selp.b32 d, a, a, a", "b32", a=a)
    with pytest.raises(ProgramError, match="before it is written"):
        execute("mov.u32 d, d", "b32", a=a)
