"""Integer instructions against their definitions in Python's integers."""

import itertools

import numpy as np
import pytest
from ptx_machine.errors import UnknownForm
from ptx_machine.single import execute

RNG = np.random.default_rng(0)


def samples(bits, count=12):
    """Ends of the ranges, powers of two and their neighbours, and random patterns."""
    top = 1 << bits - 1
    special = [0, 1, 2, 3, 7, 8, 31, 32, 33, 63, 64, 255, 256, top - 1, top, top + 1, 2 * top - 1]
    sampled = [int(x) for x in RNG.integers(0, 1 << 63, count, dtype=np.uint64)]
    return sorted({x % (1 << bits) for x in special + sampled})


def signed(x, bits):
    return x - (1 << bits) if x >> bits - 1 else x


def grid(bits, arity, count=12):
    """Every combination of samples, one array for each operand."""
    combinations = itertools.product(samples(bits, count), repeat=arity)
    return [np.array(column, f"u{bits // 8}") for column in zip(*combinations, strict=True)]


def values(array, kind):
    bits = int(kind[1:])
    return [signed(int(x), bits) if kind[0] == "s" else int(x) for x in array]


def check(instruction, kind, function, *operands, result=None):
    """`function` of Python's integers gives the result, wrapped to its width."""
    bits = int((result or kind)[1:])
    names = "abc"[: len(operands)]
    got = execute(f"{instruction} d, {', '.join(names)}", f"b{bits}",
                  **dict(zip(names, operands, strict=True)))  # fmt: skip
    assert got.dtype.itemsize * 8 == bits
    rows = zip(*(values(operand, kind) for operand in operands), strict=True)
    for found, row in zip(got, rows, strict=True):
        assert int(found) == function(*row) % (1 << bits), (instruction, row)


KINDS = [f"{sign}{bits}" for bits in (16, 32, 64) for sign in "us"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name, function",
    [
        ("add", lambda a, b: a + b),
        ("sub", lambda a, b: a - b),
        ("mul.lo", lambda a, b: a * b),
        ("min", min),
        ("max", max),
    ],
)
def test_arithmetic_wraps(name, function, kind):
    check(f"{name}.{kind}", kind, function, *grid(int(kind[1:]), 2))


@pytest.mark.parametrize("kind", KINDS)
def test_high_halves_and_wide_products(kind):
    bits = int(kind[1:])
    a, b = grid(bits, 2)
    check(f"mul.hi.{kind}", kind, lambda x, y: x * y >> bits, a, b)
    if bits < 64:
        wide = f"{kind[0]}{2 * bits}"
        check(f"mul.wide.{kind}", kind, lambda x, y: x * y, a, b, result=wide)


@pytest.mark.parametrize("kind", KINDS)
def test_products_with_an_addend(kind):
    bits = int(kind[1:])
    a, b, c = grid(bits, 3, count=1)
    check(f"mad.lo.{kind}", kind, lambda x, y, z: x * y + z, a, b, c)
    check(f"mad.hi.{kind}", kind, lambda x, y, z: (x * y >> bits) + z, a, b, c)


@pytest.mark.parametrize("kind", KINDS[:4])
def test_wide_products_with_a_wide_addend(kind):
    bits = int(kind[1:])
    a, b = grid(bits, 2)
    c = np.resize(np.array(samples(2 * bits), f"u{bits // 4}"), len(a))
    got = execute(f"mad.wide.{kind} d, a, b, c", f"b{2 * bits}", a=a, b=b, c=c)
    rows = zip(values(a, kind), values(b, kind), map(int, c), strict=True)
    assert got.tolist() == [(x * y + z) % (1 << 2 * bits) for x, y, z in rows]


def test_saturating_sums():
    def clamped(x):
        return max(-(1 << 31), min((1 << 31) - 1, x))

    a, b = grid(32, 2)
    check("add.sat.s32", "s32", lambda x, y: clamped(x + y), a, b)
    check("sub.sat.s32", "s32", lambda x, y: clamped(x - y), a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_quotients_are_cut_off(kind):
    a, b = grid(int(kind[1:]), 2)
    a, b = a[b != 0], b[b != 0]

    def quotient(x, y):
        size = abs(x) // abs(y)
        return size if (x < 0) == (y < 0) else -size

    check(f"div.{kind}", kind, quotient, a, b)
    check(f"rem.{kind}", kind, lambda x, y: x - quotient(x, y) * y, a, b)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_signs(bits):
    kind = f"s{bits}"
    (a,) = grid(bits, 1)
    check(f"neg.{kind}", kind, lambda x: -x, a)
    check(f"abs.{kind}", kind, abs, a)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_logic(bits):
    kind = f"u{bits}"
    a, b = grid(bits, 2)
    check(f"and.b{bits}", kind, lambda x, y: x & y, a, b)
    check(f"or.b{bits}", kind, lambda x, y: x | y, a, b)
    check(f"xor.b{bits}", kind, lambda x, y: x ^ y, a, b)
    check(f"not.b{bits}", kind, lambda x: ~x, a)


def test_logic_of_predicates():
    p, q = np.array([[False, False], [False, True], [True, False], [True, True]]).T
    for name, function in (
        ("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor),
    ):  # fmt: skip
        got = execute(f"{name}.pred d, p, q", "pred", p=p, q=q)
        np.testing.assert_array_equal(got, function(p, q))
    np.testing.assert_array_equal(execute("not.pred d, p", "pred", p=p), ~p)
    np.testing.assert_array_equal(execute("and.pred d, p, !q", "pred", p=p, q=q), p & ~q)


@pytest.mark.parametrize("table", [0x00, 0x96, 0xE8, 0x1B, 0xFE, 0xFF, 0x80])
def test_truth_tables(table):
    a, b, c = grid(32, 3, count=1)
    got = execute(f"lop3.b32 d, a, b, c, {table}", "b32", a=a, b=b, c=c)
    for found, x, y, z in zip(got, a, b, c, strict=True):
        # The ISA's definition: bit a * 4 + b * 2 + c of the table, for each bit.
        wanted = 0
        for i in range(32):
            row = (int(x) >> i & 1) << 2 | (int(y) >> i & 1) << 1 | (int(z) >> i & 1)
            wanted |= (table >> row & 1) << i
        assert int(found) == wanted


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_shifts(bits):
    amounts = [0, 1, 5, bits - 1, bits, bits + 1, 64, 255, 1 << 31]
    pairs = list(itertools.product(samples(bits), amounts))
    a = np.array([x for x, _ in pairs], f"u{bits // 8}")
    n = np.array([y for _, y in pairs], np.uint32)

    def by(instruction):
        return execute(f"{instruction} d, a, n", f"b{bits}", a=a, n=n).tolist()

    full = (1 << bits) - 1
    # Amounts above the width are the width.
    clipped = [(x, min(y, bits)) for x, y in pairs]
    assert by(f"shl.b{bits}") == [x << y & full for x, y in clipped]
    assert by(f"shr.u{bits}") == [x >> y for x, y in clipped]
    assert by(f"shr.b{bits}") == [x >> y for x, y in clipped]
    assert by(f"shr.s{bits}") == [signed(x, bits) >> y & full for x, y in clipped]


@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_funnel_shifts(mode):
    low, high = grid(32, 2, count=4)
    amount = np.resize(np.array([0, 1, 13, 31, 32, 33, 64, 255], np.uint32), len(low))
    left = execute(f"shf.l.{mode}.b32 d, a, b, c", "b32", a=low, b=high, c=amount)
    right = execute(f"shf.r.{mode}.b32 d, a, b, c", "b32", a=low, b=high, c=amount)
    for i, (x, y, n) in enumerate(zip(low, high, amount, strict=True)):
        n = int(n) & 31 if mode == "wrap" else min(int(n), 32)
        both = int(y) << 32 | int(x)
        assert int(left[i]) == both << n >> 32 & 0xFFFFFFFF
        assert int(right[i]) == both >> n & 0xFFFFFFFF


FIELDS = [(0, 0), (0, 1), (0, 32), (3, 5), (31, 1), (31, 8), (16, 16), (16, 40), (40, 8), (63, 1),
          (0, 64), (60, 10), (255, 1), (5, 255), (256 + 3, 256 + 5), (64, 3)]  # fmt: skip


def fields_of(bits):
    rows = list(itertools.product(samples(bits, 3), FIELDS))
    return (
        np.array([x for x, _ in rows], f"u{bits // 8}"),
        np.array([at for _, (at, _) in rows], np.uint32),
        np.array([n for _, (_, n) in rows], np.uint32),
    )


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bit_fields_are_extracted(kind):
    bits = int(kind[1:])
    a, position, length = fields_of(bits)
    got = execute(f"bfe.{kind} d, a, b, c", f"b{bits}", a=a, b=position, c=length)
    for found, x, at, n in zip(got, a, position, length, strict=True):
        x, at, n, msb = int(x), int(at) & 255, int(n) & 255, bits - 1
        # The ISA's pseudocode.
        if kind[0] == "u" or n == 0:
            sign = 0
        else:
            sign = x >> min(at + n - 1, msb) & 1
        wanted = sum(
            ((x >> at + i & 1) if i < n and at + i <= msb else sign) << i for i in range(msb + 1)
        )
        assert int(found) == wanted, (x, at, n)


@pytest.mark.parametrize("bits", [32, 64])
def test_bit_fields_are_inserted(bits):
    b, position, length = fields_of(bits)
    a = np.roll(b, 7)
    got = execute(f"bfi.b{bits} d, a, b, c, f", f"b{bits}", a=a, b=b, c=position, f=length)
    for found, x, y, at, n in zip(got, a, b, position, length, strict=True):
        x, wanted, at, n = int(x), int(y), int(at) & 255, int(n) & 255
        for i in range(n):
            if at + i < bits:
                wanted = wanted & ~(1 << at + i) | (x >> i & 1) << at + i
        assert int(found) == wanted, (x, int(y), at, n)


@pytest.mark.parametrize("bits", [32, 64])
def test_bits_are_counted_and_reversed(bits):
    (a,) = grid(bits, 1)
    kind, texts = f"u{bits}", {int(x): f"{int(x):0{bits}b}" for x in a}
    check(f"popc.b{bits}", kind, lambda x: texts[x].count("1"), a, result="u32")
    check(f"clz.b{bits}", kind, lambda x: len((texts[x] + "1").split("1")[0]), a, result="u32")
    check(f"brev.b{bits}", kind, lambda x: int(texts[x][::-1], 2), a)


def test_bytes_are_permuted():
    a, b, c = (RNG.integers(0, 1 << 32, 400, dtype=np.uint32) for _ in range(3))

    def permuted(x, y, selectors):
        held = x.to_bytes(4, "little") + y.to_bytes(4, "little")
        result = 0
        for i in range(4):
            selector = selectors >> 4 * i & 15
            byte = held[selector & 7]
            if selector & 8:
                byte = 255 if byte & 128 else 0
            result |= byte << 8 * i
        return result

    check("prmt.b32", "u32", permuted, a, b, c)
    for selectors in (0x5410, 0x7632, 0x0123, 0x8BDF):
        got = execute(f"prmt.b32 d, a, b, {selectors}", "b32", a=a, b=b)
        assert got.tolist() == [
            permuted(int(x), int(y), selectors) for x, y in zip(a, b, strict=True)
        ]


@pytest.mark.parametrize(
    "text", ["add.sat.u32 d, a, a", "mul.s32 d, a, a", "shf.l.b32 d, a, a, a", "add.cc.u32 d, a, a"]
)
def test_unknown_forms_are_errors(text):
    with pytest.raises(UnknownForm):
        execute(text, "b32", a=np.zeros(3, np.uint32))
