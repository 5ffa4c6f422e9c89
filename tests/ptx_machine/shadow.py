"""A shadow of a memory space: who last touched each unit of it, and when.

A unit is as many bytes as the narrowest access of a kernel to the space. Threads are numbered over
the whole grid, from 1 on; 0 is nobody. Of the readers two are kept, of different warps, and of
different blocks if there are any: with barriers of the whole block that is enough to find every
race; with barriers of parts of a block a third reader may be forgotten.
"""

import numpy as np

from .lanes import WARP


class Shadow:
    """`size` bytes in units of `unit` bytes; `threads` is the number of threads of a block."""

    def __init__(self, size: int, unit: int, threads: int):
        self.unit, self.threads = unit, threads
        units = -(-size // unit) + 1
        # The last writer, its tick and line, and whether the write was atomic.
        self.writer, self.write_tick, self.write_line = np.zeros((3, units), np.int32)
        self.atomic = np.zeros(units, bool)
        # The last reader, and another.
        self.reader, self.read_tick, self.read_line = np.zeros((3, units), np.int32)
        self.other, self.other_tick = np.zeros((2, units), np.int32)
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

    def record_write(self, units, thread, tick: int, line: int, atomic: bool) -> None:
        self.writer[units] = thread
        self.write_tick[units] = tick
        self.write_line[units] = line
        self.atomic[units] = atomic

    def record_read(self, units, thread, tick: int, line: int) -> None:
        """Of threads that read a unit at once, the last becomes its reader, the first the other."""
        before, before_tick = self.reader[units], self.read_tick[units]
        self.reader[units] = thread
        last = self.reader[units]
        other, other_tick = self.other[units], self.other_tick[units]
        # What was another warp's read stays, and rather one of another block.
        keep_other = (other > 0) & (self.block_of(other) != self.block_of(last))
        keep_other |= self.warp_of(before) == self.warp_of(last)
        keep_other |= before == 0
        self.other[units] = np.where(keep_other, other, before)
        self.other_tick[units] = np.where(keep_other, other_tick, before_tick)
        self.read_tick[units] = tick
        self.read_line[units] = line
        several = self.warp_of(thread) != self.warp_of(last)
        if several.any():
            self.other[units[several]] = thread[several]
            self.other_tick[units[several]] = tick
