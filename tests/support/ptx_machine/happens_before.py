"""Which accesses of the threads of a block are ordered, by the barriers between them.

Time is counted in ticks, one for each event that observers see. Of each pair of warps v, w of a
block, `known[v, w]` is the tick until which the accesses of w come before what v does now, and
`fenced[v, w]` that until which a fence has made those of w visible to the async proxy too.

Order within a warp: lanes run in step here, but a GPU promises that for no memory access. Accesses
of different lanes of a warp are ordered by the same barriers, and by bar.warp.sync.
"""

import numpy as np

from .lanes import Lanes


class HappensBefore:
    """The order so far within the blocks of a batch."""

    def __init__(self, layout):
        self.layout = layout
        shape = (layout.block_count, layout.warps_per_block, layout.warps_per_block)
        self.known = np.full(shape, -1, np.int64)
        self.fenced = np.full(shape, -1, np.int64)

    def _present(self, lanes: Lanes) -> np.ndarray:
        """[B, W]: whether a warp is among the lanes."""
        present = np.zeros(self.known.shape[:2], bool)
        present[lanes.block, lanes.warp] = True
        return present

    def barrier(self, lanes: Lanes, tick: int) -> None:
        """The warps of each block that are among `lanes` wait for one another."""
        present = self._present(lanes)
        blocks = np.flatnonzero(present.any(1))
        here = present[blocks]
        for table in (self.known, self.fenced):
            joined = np.where(here[:, :, None], table[blocks], -1).max(1)
            if table is self.known:
                joined = np.where(here, tick, joined)
            table[blocks] = np.where(here[:, :, None], joined[:, None, :], table[blocks])

    def warp_barrier(self, lanes: Lanes, tick: int) -> None:
        """The lanes of each warp meet."""
        block, warp = lanes.block[lanes.warp_starts], lanes.warp[lanes.warp_starts]
        self.known[block, warp, warp] = tick

    def fence(self, lanes: Lanes, tick: int) -> None:
        """What each warp knows of, and has done itself, becomes visible to the async proxy."""
        block, warp = lanes.block[lanes.warp_starts], lanes.warp[lanes.warp_starts]
        self.fenced[block, warp] = np.maximum(self.fenced[block, warp], self.known[block, warp])
        self.fenced[block, warp, warp] = tick

    def told(self, block: int, warps: np.ndarray, tick: int) -> np.ndarray:
        """What warps of a block tell when they arrive somewhere: rows like `known`, `fenced`."""
        told = np.stack([self.known[block, warps].max(0), self.fenced[block, warps].max(0)])
        told[0, warps] = tick
        return told

    def learns(self, block, warp, known: np.ndarray, fenced: np.ndarray) -> None:
        """Warps learn what others knew when they arrived."""
        self.known[block, warp] = np.maximum(self.known[block, warp], known)
        self.fenced[block, warp] = np.maximum(self.fenced[block, warp], fenced)
