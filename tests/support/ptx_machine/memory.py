"""Address spaces: global memory made of allocations, shared memory of a batch, parameters.

A global address is the real address of the byte on this machine, so pointers that lie in memory
work too. Every access is located first: that checks bounds and alignment, and gives positions in
one flat numbering of the space, by which observers can keep a shadow of it.
"""

import ctypes
from bisect import bisect_right
from dataclasses import dataclass, field

import numpy as np

from .errors import ProgramError

# Generic addresses of spaces that are not global lie in windows far above all real addresses.
WINDOWS = {"global": 0, "const": 0, "shared": 1 << 60, "param": 1 << 61}
# Shared memory begins where that of a GPU does, past what the system keeps for itself.
SHARED_BASE = 1024


@dataclass
class Allocation:
    """`bytes` from `start` on. `written` marks the bytes that have a value; None if all have."""

    name: str
    start: int
    bytes: np.ndarray
    written: np.ndarray | None = None
    position: int = 0

    @property
    def end(self) -> int:
        return self.start + len(self.bytes)


@dataclass
class Places:
    """Where an access falls. positions [n] are flat; each piece (rows, buffer, offsets) says in
    which buffer the rows lie that `rows` selects."""

    positions: np.ndarray
    pieces: list[tuple[slice | np.ndarray, Allocation, np.ndarray]]

    def load(self, dtype: np.dtype, count: int) -> np.ndarray:
        """[n, count] values."""
        if len(self.pieces) == 1:
            _, allocation, offsets = self.pieces[0]
            return _rows(allocation.bytes, dtype, count)[offsets // (dtype.itemsize * count)]
        values = np.empty((len(self.positions), count), dtype)
        for rows, allocation, offsets in self.pieces:
            table = _rows(allocation.bytes, dtype, count)
            values[rows] = table[offsets // (dtype.itemsize * count)]
        return values

    def load_bytes(self, size: int) -> np.ndarray:
        """[n, size] bytes, for accesses that are not aligned to their size."""
        values = np.empty((len(self.positions), size), np.uint8)
        for rows, allocation, offsets in self.pieces:
            values[rows] = allocation.bytes[offsets[:, None] + np.arange(size)]
        return values

    def store(self, values: np.ndarray) -> None:
        """Write values [n, count]; of lanes that write one place the last one wins."""
        count = values.shape[1]
        for rows, allocation, offsets in self.pieces:
            table = _rows(allocation.bytes, values.dtype, count)
            table[offsets // (values.itemsize * count)] = values[rows]


def _rows(buffer: np.ndarray, dtype: np.dtype, count: int) -> np.ndarray:
    size = dtype.itemsize * count
    return buffer[: len(buffer) // size * size].view(dtype).reshape(-1, count)


class GlobalMemory:
    """The allocations that a program may touch."""

    name = "global"

    def __init__(self):
        self.allocations: list[Allocation] = []
        self._starts: list[int] = []
        self.size = 0

    def register(self, name: str, start: int, size: int, written: bool = True) -> Allocation:
        """Make `size` bytes from the address `start` on accessible, if they are not yet.

        Memory that is registered twice keeps its state.
        """
        at = bisect_right(self._starts, start) - 1
        if at >= 0 and start + size <= self.allocations[at].end:
            return self.allocations[at]
        buffer = np.frombuffer((ctypes.c_char * size).from_address(start), np.uint8)
        marks = None if written else np.zeros(size, bool)
        allocation = Allocation(name, start, buffer, marks, self.size)
        # Positions keep the alignment of addresses, and no two allocations share a vector.
        self.size += -(-(size + 64) // 64) * 64
        self._starts.insert(at + 1, start)
        self.allocations.insert(at + 1, allocation)
        return allocation

    def register_array(self, name: str, array: np.ndarray, written: bool = True) -> Allocation:
        """`register` for the memory of a contiguous array."""
        return self.register(name, array.ctypes.data, array.nbytes, written)

    def mark_written(self, positions: np.ndarray, width: int) -> None:
        """Bytes at flat positions [n] now have a value."""
        for rows, allocation in self._owners(positions):
            offsets = positions[rows] - allocation.position
            allocation.written[offsets[:, None] + np.arange(width)] = True

    def unwritten(self, positions: np.ndarray, width: int) -> np.ndarray | None:
        """[n]: whether any byte of an access has no value; None if all have."""
        missing = None
        for rows, allocation in self._owners(positions):
            offsets = positions[rows] - allocation.position
            if missing is None:
                missing = np.zeros(len(positions), bool)
            missing[rows] = ~allocation.written[offsets[:, None] + np.arange(width)].all(1)
        return missing

    def _owners(self, positions: np.ndarray):
        """(rows, allocation) of accesses at flat positions, for allocations not all written."""
        for allocation in self.allocations:
            if allocation.written is not None:
                inside = (positions >= allocation.position) & (
                    positions < allocation.position + len(allocation.bytes)
                )
                if inside.any():
                    yield np.flatnonzero(inside), allocation

    def find(self, address: int) -> Allocation | None:
        at = bisect_right(self._starts, address) - 1
        found = self.allocations[at] if at >= 0 else None
        return found if found and address < found.end else None

    def locate(
        self, lanes, addresses: np.ndarray, size: int, what: str, align: int | None = None
    ) -> Places:
        """Where `size` bytes at each address lie, which must be multiples of `align` (or size)."""
        _check_alignment(lanes, addresses, align or size, what)
        low, high = int(addresses.min()), int(addresses.max())
        allocation = self.find(low)
        if allocation is not None and high + size <= allocation.end:
            offsets = (addresses - np.uint64(allocation.start)).view(np.int64)
            return Places(offsets + allocation.position, [(slice(None), allocation, offsets)])
        return self._locate_each(lanes, addresses, size, what)

    def _locate_each(self, lanes, addresses, size, what) -> Places:
        owner = np.searchsorted(np.array(self._starts, np.uint64), addresses, side="right") - 1
        positions = np.empty(len(addresses), np.int64)
        pieces = []
        for i in np.unique(owner):
            rows = np.flatnonzero(owner == i)
            allocation = self.allocations[max(i, 0)]
            offsets = addresses[rows].view(np.int64) - allocation.start
            outside = (offsets < 0) | (offsets + size > len(allocation.bytes))
            if outside.any():
                at = int(rows[np.flatnonzero(outside)[0]])
                raise ProgramError(
                    f"{what}: {size} bytes at {int(addresses[at]):#x} lie outside every "
                    f"allocation, the nearest below is {allocation.name} of "
                    f"{len(allocation.bytes)} bytes at {allocation.start:#x} ({lanes.name(at)})"
                )
            positions[rows] = offsets + allocation.position
            pieces.append((rows, allocation, offsets))
        return Places(positions, pieces)


@dataclass
class SharedMemory:
    """The shared memory of a batch: `size` bytes for each of `blocks` blocks."""

    blocks: int
    size: int
    name: str = "shared"
    stride: int = field(init=False)
    buffer: Allocation = field(init=False)

    def __post_init__(self):
        self.stride = -(-self.size // 128) * 128
        self.buffer = Allocation("shared", 0, np.zeros(self.blocks * self.stride, np.uint8))

    def locate(self, lanes, addresses: np.ndarray, size: int, what: str) -> Places:
        return self.locate_in(lanes, lanes.block, addresses, size, what)

    def locate_in(self, lanes, block, addresses, size: int, what: str, rows=None) -> Places:
        """Places for addresses [n] within the blocks [n]; rows [n] are the lanes they belong to."""
        _check_alignment(lanes, addresses, size, what, rows)
        offsets = addresses.astype(np.int64) - SHARED_BASE
        if offsets.min() < 0 or offsets.max() + size > self.size:
            at = int(np.flatnonzero((offsets < 0) | (offsets + size > self.size))[0])
            raise ProgramError(
                f"{what}: {size} bytes at {offsets[at]} lie outside the {self.size} bytes of "
                f"shared memory ({lanes.name(at if rows is None else int(rows[at]))})"
            )
        positions = offsets + block * self.stride
        return Places(positions, [(slice(None), self.buffer, positions)])


@dataclass
class ParameterMemory:
    """The kernel's parameters, the same for every thread; addresses are offsets."""

    data: np.ndarray
    name: str = "param"

    def locate(self, lanes, addresses: np.ndarray, size: int, what: str) -> Places:
        _check_alignment(lanes, addresses, size, what)
        offsets = addresses.astype(np.int64)
        if offsets.min() < 0 or offsets.max() + size > len(self.data):
            raise ProgramError(f"{what}: outside the kernel's {len(self.data)} parameter bytes")
        return Places(offsets, [(slice(None), Allocation("parameters", 0, self.data), offsets)])


def _check_alignment(lanes, addresses, size: int, what: str, rows=None) -> None:
    stray = addresses & addresses.dtype.type(size - 1)
    if stray.any():
        at = int(np.flatnonzero(stray)[0])
        raise ProgramError(
            f"{what}: address {int(addresses[at]):#x} is no multiple of {size} bytes "
            f"({lanes.name(at if rows is None else int(rows[at]))})"
        )
