"""ld, st, atom and red."""

import numpy as np

from .errors import ProgramError
from .floats import flush
from .forms import UNSIGNED, Decoder, Source, form
from .memory import WINDOWS
from .observer import Access
from .syntax import BITS, Address, Immediate, Register, Symbol, Vector

TYPES = tuple(f"{sign}{bits}" for bits in (8, 16, 32, 64) for sign in "bus") + ("f32", "f64")
_SEMANTICS = ("weak", "volatile", "relaxed", "acquire", "release", "acq_rel")
_SCOPES = ("cta", "cluster", "gpu", "sys")
_CACHE = ("ca", "cg", "cs", "lu", "cv", "wb", "wt")
_EVICTION = tuple(
    f"{level}::evict_{kind}"
    for level in ("L1", "L2")
    for kind in ("normal", "unchanged", "first", "last")
) + ("L1::no_allocate",)
_PREFETCH = ("L2::64B", "L2::128B", "L2::256B")
_SPACES = {
    "global": "global", "shared": "shared", "shared::cta": "shared", "param": "param",
    "param::entry": "param", "const": "global",
}  # fmt: skip


def take_space(d: Decoder) -> str:
    """The state space among the modifiers, "generic" where none is named."""
    found = d.take(*_SPACES)
    return _SPACES[found] if found else "generic"


def address_reader(d: Decoder, operand, space: str) -> Source:
    """A function that computes the addresses [n] of an operand [base + offset]."""
    if not isinstance(operand, Address) or operand.coordinates is not None:
        raise d.error(f"{operand} is no address")
    base = operand.base
    if isinstance(base, Symbol) and base.name in d.symbols:
        own, start = d.symbols[base.name]
        if space not in (own, "generic"):
            raise d.error(f"{base.name} is in the space {own}, not in {space}")
        start += WINDOWS[own] if space == "generic" else 0
        return _constant_address(start + operand.offset)
    if isinstance(base, Immediate):
        return _constant_address(base.value + operand.offset)
    if not isinstance(base, Register) or base.type[1:] not in ("32", "64"):
        raise d.error(f"address of {operand}")
    if base.type[1:] == "32" and space != "shared":
        raise d.error(f"a 32-bit address in the space {space}")
    read = d.reader(base, f"u{base.type[1:]}")
    if operand.offset == 0:
        return read
    bits = BITS[base.type]
    offset = UNSIGNED[bits].type(operand.offset & ((1 << bits) - 1))
    return lambda lanes: read(lanes) + offset


def _constant_address(value: int) -> Source:
    return lambda lanes: np.full(lanes.count, value, np.uint64)


def by_space(space: str, operation):
    """operation(lanes, addresses, memory) for the memory that the addresses belong to.

    Generic addresses are told apart by value, lane by lane.
    """
    if space != "generic":
        return lambda lanes, addresses: operation(lanes, addresses, lanes.batch.memory[space])

    def generic(lanes, addresses):
        left = np.ones(lanes.count, bool)
        for name in ("param", "shared", "global"):
            here = left & (addresses >= np.uint64(WINDOWS[name]))
            if here.any():
                some = addresses[here] - np.uint64(WINDOWS[name])
                operation(lanes.where(here), some, lanes.batch.memory[name])
                left &= ~here

    return generic


@form("ld", pipe="memory")
def _load(d: Decoder):
    semantics = d.take(*_SEMANTICS)
    if semantics in ("relaxed", "acquire"):
        d.need(*_SCOPES)
    space = take_space(d)
    d.take("nc")
    for hints in (_CACHE, _EVICTION, _PREFETCH):
        d.take(*hints)
    vector = d.take("v2", "v4")
    kind = d.need(*TYPES)
    count = int(vector[1]) if vector else 1
    targets = d.elements(0, (count,)) if vector else (_scalar(d.operand(0)),)
    writers = [d.extending_writer(target, kind) for target in targets]
    address = address_reader(d, d.operand(1), space)
    d.touches(space, BITS[kind] // 8)
    size, dtype = BITS[kind] // 8 * count, np.dtype(f"{_letter(kind)}{BITS[kind] // 8}")
    instruction, what = d.instruction, describe(d)

    def load(lanes, addresses, memory):
        places = memory.locate(lanes, addresses, size, what)
        if lanes.batch.observers:
            lanes.batch.access(
                Access(instruction, lanes, memory.name, "read", places.positions, addresses, size)
            )
        values = places.load(dtype, count)
        for i, write in enumerate(writers):
            write(lanes, values[:, i])

    run = by_space(space, load)
    return lambda lanes: run(lanes, address(lanes))


def _letter(kind: str) -> str:
    return {"s": "i", "f": "f"}.get(kind[0], "u")


def _scalar(operand):
    """{a} stands for a."""
    if isinstance(operand, Vector) and len(operand.elements) == 1:
        return operand.elements[0]
    return operand


def describe(d: Decoder) -> str:
    return f"{d.kernel.name}, line {d.instruction.line}, {d.instruction.text!r}"


def narrowing_reader(d: Decoder, operand, kind: str) -> Source:
    """Reads the low bits of a register that may be wider than the type."""
    if not isinstance(operand, Register) or BITS[operand.type] <= BITS[kind]:
        return d.reader(operand, kind)
    read, dtype = d.reader(operand, f"b{BITS[operand.type]}"), UNSIGNED[BITS[kind]]
    return lambda lanes: read(lanes).astype(dtype)


@form("st", pipe="memory")
def _store(d: Decoder):
    semantics = d.take(*_SEMANTICS)
    if semantics in ("relaxed", "release"):
        d.need(*_SCOPES)
    space = take_space(d)
    for hints in (_CACHE, _EVICTION):
        d.take(*hints)
    vector = d.take("v2", "v4")
    kind = d.need(*TYPES)
    count = int(vector[1]) if vector else 1
    elements = d.elements(1, (count,)) if vector else (_scalar(d.operand(1)),)
    bits = f"b{BITS[kind]}" if kind[0] != "f" else kind
    readers = [narrowing_reader(d, element, bits) for element in elements]
    address = address_reader(d, d.operand(0), space)
    d.touches(space, BITS[kind] // 8)
    size, dtype = BITS[kind] // 8 * count, UNSIGNED[BITS[kind]]
    instruction, what = d.instruction, describe(d)

    def store(lanes, addresses, memory):
        if memory.name == "param":
            raise ProgramError(f"{what}: parameters cannot be written")
        values = np.empty((lanes.count, count), dtype)
        for i, read in enumerate(readers):
            values[:, i] = read(lanes).view(dtype)
        places = memory.locate(lanes, addresses, size, what)
        if lanes.batch.observers:
            lanes.batch.access(
                Access(
                    instruction, lanes, memory.name, "write", places.positions, addresses, size,
                    values,
                )
            )  # fmt: skip
        places.store(values)

    run = by_space(space, store)
    return lambda lanes: run(lanes, address(lanes))


_ATOMIC = {
    "add": lambda old, b: old + b,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, b: b,
    "inc": lambda old, b: old.dtype.type(0) if old >= b else old + old.dtype.type(1),
    "dec": lambda old, b: b if old == 0 or old > b else old - old.dtype.type(1),
}


def _add_flushing(old, b):
    """The sum of float32 in global memory: subnormal inputs and results count as zero."""
    return flush(flush(old) + flush(b))


_ATOMIC_TYPES = {
    "add": ("u32", "s32", "u64", "f32", "f64"),
    "min": ("u32", "s32", "u64", "s64"),
    "max": ("u32", "s32", "u64", "s64"),
    "and": ("b32", "b64"), "or": ("b32", "b64"), "xor": ("b32", "b64"),
    "exch": ("b32", "b64"), "cas": ("b32", "b64"), "inc": ("u32",), "dec": ("u32",),
}  # fmt: skip


@form("atom", "red", pipe="memory")
def _atomic(d: Decoder):
    """Read, change and write one word; lanes take their turns in ascending order."""
    returns = d.instruction.mnemonic == "atom"
    semantics = ("relaxed", "acquire", "release", "acq_rel")
    order, scope = d.take(*semantics), d.take(*_SCOPES)
    space = take_space(d)
    if order is None and scope is None:  # Triton names the space first
        d.take(*_SCOPES)
        d.take(*semantics)
    name = d.need(*_ATOMIC_TYPES)
    kind = d.need(*_ATOMIC_TYPES[name])
    first = 1 if returns else 0
    address = address_reader(d, d.operand(first), space)
    d.touches(space, BITS[kind] // 8)
    b = d.source(first + 1, kind)
    c = d.source(first + 2, kind) if name == "cas" else None
    write = d.destination(0, kind) if returns else None
    size, dtype = BITS[kind] // 8, np.dtype(f"{_letter(kind)}{BITS[kind] // 8}")
    instruction, what = d.instruction, describe(d)
    flushes = (name, kind) == ("add", "f32")

    def change(lanes, addresses, memory):
        places = memory.locate(lanes, addresses, size, what)
        if lanes.batch.observers:
            lanes.batch.access(
                Access(instruction, lanes, memory.name, "atomic", places.positions, addresses, size)
            )
        operand = np.broadcast_to(b(lanes), lanes.count)
        swap = np.broadcast_to(c(lanes), lanes.count) if c else None
        before = np.empty(lanes.count, dtype)
        current = places.load(dtype, 1)[:, 0]
        _, word = np.unique(places.positions, return_inverse=True)
        # What lies in shared memory keeps its subnormal values.
        combine = _add_flushing if flushes and memory.name == "global" else _ATOMIC.get(name)
        latest: dict[int, np.generic] = {}
        for i in range(lanes.count):
            old = latest.get(word[i], current[i])
            before[i] = old
            if name == "cas":
                latest[word[i]] = swap[i] if old == operand[i] else old
            else:
                latest[word[i]] = combine(old, operand[i])
        final = np.array([latest[w] for w in word], dtype)
        places.store(final[:, None])
        if write is not None:
            write(lanes, before)

    run = by_space(space, change)
    return lambda lanes: run(lanes, address(lanes))
