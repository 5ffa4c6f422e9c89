"""mov, selp, setp and the conversions between address spaces."""

import numpy as np

from .floats import flush
from .forms import UNSIGNED, Decoder, form
from .syntax import BITS, Register, Special, Symbol, Vector

INTEGERS = tuple(f"{sign}{bits}" for bits in (16, 32, 64) for sign in "us")
BITWISE = ("b16", "b32", "b64")
FLOATS = ("f32", "f64")


@form("mov", pipe="move")
def _move(d: Decoder):
    kind = d.need("pred", *BITWISE, *INTEGERS, *FLOATS)
    to, value = d.operand(0), d.operand(1)
    if isinstance(to, Vector):
        return _unpack(d, to.elements, kind)
    if isinstance(value, Vector):
        return _pack(d, value.elements, kind)
    read, write = d.reader(value, kind), d.writer(to, kind)
    return lambda lanes: write(lanes, read(lanes))


def _part(d: Decoder, kind: str, count: int) -> str:
    if kind not in ("b32", "b64") or count not in (2, 4) or BITS[kind] // count < 16:
        raise d.error(f"{count} parts of a {kind}")
    return f"b{BITS[kind] // count}"


def _unpack(d: Decoder, elements: tuple, kind: str):
    """mov.b64 {a, b}, c: the low bits go to a."""
    part = _part(d, kind, len(elements))
    read = d.reader(d.operand(1), kind)
    writers = [d.writer(element, part) for element in elements]
    dtype, narrow = UNSIGNED[BITS[kind]].type, UNSIGNED[BITS[part]]

    def operation(lanes):
        value = read(lanes)
        for i, write in enumerate(writers):
            write(lanes, (value >> dtype(BITS[part] * i)).astype(narrow))

    return operation


def _pack(d: Decoder, elements: tuple, kind: str):
    part = _part(d, kind, len(elements))
    readers = [d.reader(element, part) for element in elements]
    write = d.writer(d.operand(0), kind)
    dtype = UNSIGNED[BITS[kind]].type

    def operation(lanes):
        value = dtype(0)
        for i, read in enumerate(readers):
            value = value | read(lanes).astype(dtype) << dtype(BITS[part] * i)
        write(lanes, value)

    return operation


@form("selp", pipe="alu")
def _select(d: Decoder):
    """d = p ? a : b"""
    kind = d.need(*BITWISE, *INTEGERS, *FLOATS)
    a, b, p = d.source(1, kind), d.source(2, kind), d.source(3, "pred")
    write = d.destination(0, kind)
    return lambda lanes: write(lanes, np.where(p(lanes), a(lanes), b(lanes)))


_ORDERED = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
_UNSIGNED_NAMES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


def _comparison(d: Decoder, name: str, kind: str):
    """The function behind a comparison. Of floats, only the unordered ones are true of NaN."""
    if kind[0] != "f":
        allowed = {"b": ("eq", "ne"), "s": _ORDERED, "u": (*_ORDERED, *_UNSIGNED_NAMES)}[kind[0]]
        if name not in allowed:
            raise d.error(f"the comparison .{name} of {kind}")
        return _ORDERED[_UNSIGNED_NAMES.get(name, name)]
    if name == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    if name == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    if name == "ne":
        return lambda a, b: (a < b) | (a > b)
    if name in _ORDERED:
        return _ORDERED[name]
    if name == "neu":
        return np.not_equal
    opposite = {"equ": "ne", "ltu": "ge", "leu": "gt", "gtu": "le", "geu": "lt"}.get(name)
    if opposite is None:
        raise d.error(f"the comparison .{name} of {kind}")
    ordered = _comparison(d, opposite, kind)
    return lambda a, b: ~ordered(a, b)


@form("setp", pipe="alu")
def _compare(d: Decoder):
    """p = a ? b, or p|q with q the opposite; with a third operand c, both combined with c."""
    name = d.modifiers.pop(0) if d.modifiers else ""
    combine = d.take("and", "or", "xor")
    ftz = bool(d.take("ftz"))
    kind = d.need(*BITWISE, *INTEGERS, *FLOATS)
    if ftz and kind != "f32":
        raise d.error(f".ftz for {kind}")
    compare = _comparison(d, name, kind)
    a, b = d.source(1, kind), d.source(2, kind)
    c = d.source(3, "pred") if combine else None
    write, write_opposite = d.pair(0, "pred")
    join = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}.get(combine)

    def operation(lanes):
        x, y = a(lanes), b(lanes)
        result = compare(flush(x), flush(y)) if ftz else compare(x, y)
        opposite = ~result
        if join is not None:
            other = c(lanes)
            result, opposite = join(result, other), join(opposite, other)
        write(lanes, result)
        if write_opposite is not None:
            write_opposite(lanes, opposite)

    return operation


@form("cvta", pipe="move")
def _convert_address(d: Decoder):
    """Between generic addresses and those of a space.

    A generic address of global memory is the address itself; the other spaces have windows.
    """
    to = d.take("to")
    space = d.need("global", "shared", "local", "const", "param")
    kind = d.need("u64")
    value = d.operand(1)
    if not isinstance(value, Register | Symbol | Special):
        raise d.error("an address is expected")
    read, write = d.reader(value, kind), d.destination(0, kind)

    def operation(lanes):
        window = np.uint64(lanes.batch.window(space))
        address = read(lanes)
        write(lanes, address - window if to else address + window)

    return operation
