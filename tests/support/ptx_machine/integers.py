"""Integer arithmetic, logic, shifts and bit fields. All of it wraps around."""

import numpy as np

from .forms import UNSIGNED, Decoder, dtype_of, form
from .syntax import BITS, Immediate

INTEGERS = tuple(f"{sign}{bits}" for bits in (16, 32, 64) for sign in "us")


def _elementwise(d: Decoder, kinds: tuple[str, ...], function, result: str | None = None):
    """d = function(a, b, ...) with all operands of the types `kinds`."""
    sources = [d.source(i + 1, kind) for i, kind in enumerate(kinds)]
    write = d.destination(0, result or kinds[0])
    if len(sources) == 1:
        (a,) = sources
        return lambda lanes: write(lanes, function(a(lanes)))
    if len(sources) == 2:
        a, b = sources
        return lambda lanes: write(lanes, function(a(lanes), b(lanes)))
    return lambda lanes: write(lanes, function(*(source(lanes) for source in sources)))


@form("add", "sub", "min", "max", pipe="alu")
def _arithmetic(d: Decoder):
    from . import floats

    name = d.instruction.mnemonic
    if d.modifiers and d.modifiers[-1] not in INTEGERS:
        return floats.arithmetic(d, name)
    saturating = name in ("add", "sub") and d.take("sat")
    kind = d.need(*(("s32",) if saturating else INTEGERS))
    if saturating:
        exact = np.add if name == "add" else np.subtract

        def saturated(a, b):
            wide = exact(a.astype(np.int64), b.astype(np.int64))
            return np.clip(wide, -(1 << 31), (1 << 31) - 1).astype(np.int32)

        return _elementwise(d, (kind, kind), saturated)
    function = {"add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum}[name]
    return _elementwise(d, (kind, kind), function)


@form("mul", "mad", pipe="imad")
def _product(d: Decoder):
    """mul and mad: the low half, the high half, or all bits of the product (plus c)."""
    from . import floats

    name = d.instruction.mnemonic
    if d.modifiers[-1:] and d.modifiers[-1] not in INTEGERS:
        return floats.arithmetic(d, name)
    part = d.need("lo", "hi", "wide")
    kind = d.need(*(INTEGERS[:4] if part == "wide" else INTEGERS))
    wide = f"{kind[0]}{2 * BITS[kind]}"
    function = {
        "lo": np.multiply,
        "hi": _high_product,
        "wide": lambda a, b: a.astype(dtype_of(wide)) * b.astype(dtype_of(wide)),
    }[part]
    result = wide if part == "wide" else kind
    if name == "mul":
        return _elementwise(d, (kind, kind), function, result)
    return _elementwise(d, (kind, kind, result), lambda a, b, c: function(a, b) + c, result)


def _high_product(a, b):
    bits = 8 * a.dtype.itemsize
    signed = a.dtype.kind == "i"
    if bits < 64:
        wide = np.int64 if signed else np.uint64
        return (a.astype(wide) * b.astype(wide) >> wide(bits)).astype(a.dtype)
    x, y = np.atleast_1d(a).view(np.uint64), np.atleast_1d(b).view(np.uint64)
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    x0, x1, y0, y1 = x & low, x >> half, y & low, y >> half
    middle = x1 * y0 + (x0 * y0 >> half)
    carried = (middle & low) + x0 * y1
    high = x1 * y1 + (middle >> half) + (carried >> half)
    if signed:
        zero = np.uint64(0)
        high = high - np.where(x >> np.uint64(63), y, zero) - np.where(y >> np.uint64(63), x, zero)
    return high.view(a.dtype)


@form("div", "rem", pipe="alu")
def _quotient(d: Decoder):
    """Quotients truncated towards zero. By zero the ISA leaves the value open: all ones here."""
    from . import floats

    name = d.instruction.mnemonic
    if d.modifiers[-1:] and d.modifiers[-1] not in INTEGERS:
        return floats.quotient(d)
    kind = d.need(*INTEGERS)

    def truncated(a, b):
        a, b = np.broadcast_arrays(a, b)
        divisor = np.where(b == 0, b.dtype.type(1), b)
        quotient = a // divisor
        rest = a - quotient * divisor
        if kind[0] == "s":
            inexact = (rest != 0) & ((a < 0) != (divisor < 0))
            quotient = np.where(inexact, quotient + 1, quotient)
            rest = np.where(inexact, rest - divisor, rest)
        ones = ~b.dtype.type(0)
        return np.where(b == 0, ones, quotient if name == "div" else rest)

    return _elementwise(d, (kind, kind), truncated)


@form("abs", "neg", pipe="alu")
def _sign(d: Decoder):
    from . import floats

    name = d.instruction.mnemonic
    if d.modifiers[-1:] and d.modifiers[-1][0] != "s":
        return floats.sign(d, name)
    return _elementwise(d, (d.need("s16", "s32", "s64"),), np.abs if name == "abs" else np.negative)


@form("and", "or", "xor", pipe="alu")
def _logic(d: Decoder):
    kind = d.need("pred", "b16", "b32", "b64")
    name = d.instruction.mnemonic
    function = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[name]
    return _elementwise(d, (kind, kind), function)


@form("not", pipe="alu")
def _complement(d: Decoder):
    return _elementwise(d, (d.need("pred", "b16", "b32", "b64"),), np.invert)


@form("lop3", pipe="alu")
def _truth_table(d: Decoder):
    """lop3: any function of three bits, given by its truth table."""
    kind, table = d.need("b32"), d.constant(4, range(256))

    def function(a, b, c):
        result = np.uint32(0)
        for row in range(8):
            if table >> row & 1:
                terms = (a if row & 4 else ~a), (b if row & 2 else ~b), (c if row & 1 else ~c)
                result = result | (terms[0] & terms[1] & terms[2])
        return result

    return _elementwise(d, (kind, kind, kind), function)


@form("shl", pipe="alu")
def _shift_left(d: Decoder):
    kind = d.need("b16", "b32", "b64")
    bits, dtype = BITS[kind], UNSIGNED[BITS[kind]].type

    def function(a, amount):
        shifted = a << np.minimum(amount, bits - 1).astype(dtype)
        return np.where(amount >= bits, dtype(0), shifted)

    return _elementwise(d, (kind, "u32"), function)


@form("shr", pipe="alu")
def _shift_right(d: Decoder):
    """Amounts from the width of the type on leave the sign, or zeros."""
    kind = d.need(*INTEGERS, "b16", "b32", "b64")
    bits, dtype = BITS[kind], dtype_of(kind).type

    def function(a, amount):
        shifted = a >> np.minimum(amount, bits - 1).astype(dtype)
        return shifted if kind[0] == "s" else np.where(amount >= bits, dtype(0), shifted)

    return _elementwise(d, (kind, "u32"), function)


@form("shf", pipe="alu")
def _funnel_shift(d: Decoder):
    """32 bits of b:a, shifted to the left or the right by c."""
    direction, mode = d.need("l", "r"), d.need("wrap", "clamp")
    kind = d.need("b32")

    def function(a, b, amount):
        both = (b.astype(np.uint64) << np.uint64(32)) | a.astype(np.uint64)
        amount = amount & np.uint32(31) if mode == "wrap" else np.minimum(amount, np.uint32(32))
        amount = amount.astype(np.uint64)
        if direction == "l":
            return (both << amount >> np.uint64(32)).astype(np.uint32)
        return (both >> amount).astype(np.uint32)

    return _elementwise(d, (kind, kind, "u32"), function)


@form("bfe", pipe="alu")
def _extract_bits(d: Decoder):
    """`length` bits from `position` on; past the end, and above the field, zeros or its sign."""
    kind = d.need("u32", "s32", "u64", "s64")
    bits, unsigned, dtype = BITS[kind], UNSIGNED[BITS[kind]].type, dtype_of(kind).type

    def function(a, position, length):
        position, length = position & np.uint32(255), length & np.uint32(255)
        # Shifted up until the field ends at the top, then down again: by sign, or by zeros.
        end = np.minimum(position + length, np.uint32(bits))
        field = a.view(unsigned) << (np.uint32(bits) - end).astype(unsigned) % unsigned(bits)
        taken = np.minimum(length, np.uint32(bits))
        down = (np.uint32(bits) - taken).astype(dtype) % dtype(bits)
        beyond = position + length > bits
        result = field.view(dtype) >> down
        if beyond.any():
            top = a >> np.minimum(position, bits - 1).astype(dtype)
            if kind[0] == "u":
                top = np.where(position >= bits, dtype(0), top)
            result = np.where(beyond, top, result)
        return np.where(length == 0, dtype(0), result)

    return _elementwise(d, (kind, "u32", "u32"), function)


@form("bfi", pipe="alu")
def _insert_bits(d: Decoder):
    """b with `length` bits from `position` on replaced by the low bits of a."""
    kind = d.need("b32", "b64")
    bits, dtype = BITS[kind], UNSIGNED[BITS[kind]].type

    def function(a, b, position, length):
        position, length = position & np.uint32(255), length & np.uint32(255)
        room = np.minimum(length, np.uint32(bits))
        ones = np.where(
            room == 0, dtype(0), ~dtype(0) >> (np.uint32(bits) - np.maximum(room, 1)).astype(dtype)
        )
        by = np.minimum(position, bits - 1).astype(dtype)
        mask = np.where(position >= bits, dtype(0), ones << by)
        return (b & ~mask) | ((a << by) & mask)

    return _elementwise(d, (kind, kind, "u32", "u32"), function)


@form("popc", "clz", pipe="alu")
def _count_bits(d: Decoder):
    kind = d.need("b32", "b64")
    bits = BITS[kind]

    def ones(a):
        return np.bitwise_count(a).astype(np.uint32)

    def leading_zeros(a):
        for by in (1, 2, 4, 8, 16, 32)[: bits.bit_length() - 1]:
            a = a | a >> a.dtype.type(by)
        return np.uint32(bits) - np.bitwise_count(a).astype(np.uint32)

    function = ones if d.instruction.mnemonic == "popc" else leading_zeros
    return _elementwise(d, (kind,), function, "u32")


@form("brev", pipe="alu")
def _reverse_bits(d: Decoder):
    kind = d.need("b32", "b64")
    bits, dtype = BITS[kind], UNSIGNED[BITS[kind]].type

    def function(a):
        result = dtype(0)
        for i in range(bits):
            result = result | (a >> dtype(i) & dtype(1)) << dtype(bits - 1 - i)
        return result

    return _elementwise(d, (kind,), function)


@form("prmt", pipe="alu")
def _permute_bytes(d: Decoder):
    """Four bytes of b:a by the four selectors of c, of which bit 3 asks for the sign alone."""
    kind = d.need("b32")
    selector = d.operand(3)
    fixed = selector.value if isinstance(selector, Immediate) else None

    def function(a, b, c):
        both = (b.astype(np.uint64) << np.uint64(32)) | a.astype(np.uint64)
        result = np.uint32(0)
        for i in range(4):
            nibble = (c >> np.uint32(4 * i) & np.uint32(15)).astype(np.uint64)
            byte = both >> ((nibble & np.uint64(7)) * np.uint64(8)) & np.uint64(255)
            if fixed is None or fixed >> 4 * i & 8:
                signs = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
                byte = np.where(nibble & np.uint64(8), signs, byte)
            result = result | byte.astype(np.uint32) << np.uint32(8 * i)
        return result

    return _elementwise(d, (kind, kind, kind), function)
