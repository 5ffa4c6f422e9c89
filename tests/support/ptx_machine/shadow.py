"""A shadow of a memory space: who last touched each unit of it, and when.

A unit is as many bytes as the narrowest access of a kernel to the space. Threads are numbered over
the whole grid, from 1 on; 0 is nobody. Of the plain writers the last is kept: whoever wrote before
it was ordered before it, was reported, or stored the same value. Accesses that do not conflict
among themselves may all conflict with a later one: of the readers, and of those who change a unit
atomically, two are kept, of different warps, and of different blocks if there are any. With
barriers of the whole block a race between warps is found by these; with barriers of parts of a
block a third one may be forgotten. Of the lanes of a warp the last one alone is kept: when it goes
on to write what it and other lanes of its warp have read, their reads are forgotten and no race is
found.
"""

import numpy as np

from .lanes import WARP


class Accesses:
    """Of accesses to each unit that do not conflict: the last thread, its tick and line, and
    another thread."""

    def __init__(self, units: int):
        self.last, self.tick, self.line = np.zeros((3, units), np.int32)
        self.other, self.other_tick = np.zeros((2, units), np.int32)


class Shadow:
    """`size` bytes in units of `unit` bytes; `threads` is the number of threads of a block."""

    def __init__(self, size: int, unit: int, threads: int):
        self.unit, self.threads = unit, threads
        units = -(-size // unit) + 1
        # The last plain writer, its tick and line.
        self.writer, self.write_tick, self.write_line = np.zeros((3, units), np.int32)
        self.reads, self.atomics = Accesses(units), Accesses(units)
        # How many asynchronous operations that write, or read, are not done.
        self.written_by, self.read_by = np.zeros((2, units), np.int16)

    def units(self, positions: np.ndarray, width: int) -> tuple[np.ndarray, int]:
        """The units [n * k] of accesses at positions [n], and k."""
        each = max(1, width // self.unit)
        first = positions // self.unit
        return (first[:, None] + np.arange(each)).reshape(-1), each

    def warp_of(self, thread: np.ndarray) -> np.ndarray:
        """A number of the warp that is unique in the grid; threads are numbered from 1."""
        return (thread - 1) // WARP

    def block_of(self, thread: np.ndarray) -> np.ndarray:
        return (thread - 1) // self.threads

    def record_write(self, units, thread, tick: int, line: int) -> None:
        self.writer[units] = thread
        self.write_tick[units] = tick
        self.write_line[units] = line

    def record_shared(self, table: "Accesses", units, thread, tick: int, line: int) -> None:
        """Of threads that access a unit at once the last is entered, and one of another warp."""
        before, before_tick = table.last[units], table.tick[units]
        table.last[units] = thread
        last = table.last[units]
        other, other_tick = table.other[units], table.other_tick[units]
        # What was another warp's access stays, and rather one of another block.
        keep_other = (other > 0) & (self.block_of(other) != self.block_of(last))
        keep_other |= self.warp_of(before) == self.warp_of(last)
        keep_other |= before == 0
        table.other[units] = np.where(keep_other, other, before)
        table.other_tick[units] = np.where(keep_other, other_tick, before_tick)
        table.tick[units] = tick
        table.line[units] = line
        several = self.warp_of(thread) != self.warp_of(last)
        if several.any():
            table.other[units[several]] = thread[several]
            table.other_tick[units[several]] = tick
