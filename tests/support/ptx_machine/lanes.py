"""The threads of a batch of blocks, side by side, and the part of them that runs at a time.

Threads lie in slots. The slots are sorted by strand first (the position of a warp in the order in
which the schedule runs the warps of its block), then by block, then by lane, so that the warps that
run together are one slice and every 32 slots from a multiple of 32 on are one warp.
"""

from functools import cached_property

import numpy as np

from .errors import ProgramError

WARP = 32


class Layout:
    """Which thread lies in which slot.

    blocks [B, 3] are the coordinates of the blocks; order [B, W] gives, for each block, its warps
    in the order of the strands.
    """

    def __init__(self, blocks: np.ndarray, order: np.ndarray, block_size: tuple[int, int, int]):
        count, warps = order.shape
        self.blocks, self.block_size = blocks, block_size
        self.block_count, self.warps_per_block = count, warps
        self.size = count * warps * WARP
        lane = np.arange(WARP, dtype=np.int64)
        shape = (warps, count, WARP)
        # [slots]: the block (an index into `blocks`), the warp of the block, the thread of it.
        self.block = np.broadcast_to(np.arange(count)[:, None], shape).reshape(-1)
        self.warp = np.broadcast_to(order.T[:, :, None], shape).reshape(-1).astype(np.int64)
        self.thread = (order.T[:, :, None] * WARP + lane).reshape(-1)
        self.lane = np.broadcast_to(lane, shape).reshape(-1)
        self.strand = np.repeat(np.arange(warps), count * WARP)
        # The last warp of a block may have fewer threads than lanes.
        self.threads_per_block = int(np.prod(block_size))
        self.exists = self.thread < self.threads_per_block

    def complete(self, lanes: "Lanes", size: int) -> "Lanes":
        """Those of `lanes` whose warp (size 32) or warpgroup (128) is there as a whole.

        The very object where all are.
        """
        if lanes.count == self.size and self.warps_per_block * WARP % size == 0:
            return lanes
        if size == WARP and lanes.whole_warps:
            return lanes
        slots = lanes.slots
        part = self.warp[slots] * WARP // size
        key = self.block[slots] * self.warps_per_block + part
        threads = np.minimum(size, self.threads_per_block - part * size)
        whole = np.bincount(key)[key] == threads
        return lanes.where(whole) if whole.any() else Lanes(lanes.batch, slots[:0])

    def name(self, slot: int) -> str:
        """For messages: "block (1, 0, 0), warp 2, lane 5"."""
        block = tuple(int(i) for i in self.blocks[self.block[slot]])
        return f"block {block}, warp {self.warp[slot]}, lane {self.lane[slot]}"


class Lanes:
    """Some slots of a batch, ascending. `index` selects them in an array over all slots."""

    def __init__(self, batch, slots: np.ndarray | slice):
        self.batch = batch
        self.registers = batch.registers
        if not isinstance(slots, slice) and len(slots):
            if slots[-1] - slots[0] + 1 == len(slots):
                slots = slice(int(slots[0]), int(slots[-1]) + 1)
        self.index = slots
        self.count = slots.stop - slots.start if isinstance(slots, slice) else len(slots)

    @cached_property
    def slots(self) -> np.ndarray:
        if isinstance(self.index, slice):
            return np.arange(self.index.start, self.index.stop)
        return self.index

    @cached_property
    def block(self) -> np.ndarray:
        return self.batch.layout.block[self.index]

    @cached_property
    def warp(self) -> np.ndarray:
        return self.batch.layout.warp[self.index]

    @cached_property
    def whole_warps(self) -> bool:
        """Whether every warp here is here with all its lanes."""
        if isinstance(self.index, slice):
            return self.index.start % WARP == 0 and self.index.stop % WARP == 0
        if self.count % WARP:
            return False
        first = self.index[::WARP]
        return bool(((first % WARP == 0) & (self.index[WARP - 1 :: WARP] == first + 31)).all())

    @cached_property
    def warpgroups(self) -> np.ndarray:
        """[G, 128]: the positions (not slots) of the lanes of each warpgroup in their order."""
        layout, slots = self.batch.layout, self.slots
        order = np.lexsort((layout.thread[slots], layout.block[slots]))
        return order.reshape(-1, 4 * WARP)

    @cached_property
    def warp_starts(self) -> np.ndarray:
        """Positions (not slots) at which a new warp begins."""
        number = self.slots // WARP
        return np.flatnonzero(np.diff(number, prepend=-1))

    @property
    def warp_count(self) -> int:
        return len(self.warp_starts)

    def where(self, mask: np.ndarray) -> "Lanes":
        """The lanes whose entry of `mask` is true; self where all are."""
        if mask.all():
            return self
        return Lanes(self.batch, self.slots[mask])

    def nobody(self) -> "Lanes":
        """No lanes of the same batch."""
        return Lanes(self.batch, self.slots[:0])

    def union(self, other: "Lanes") -> "Lanes":
        return Lanes(self.batch, np.sort(np.concatenate([self.slots, other.slots])))

    def name(self, position: int) -> str:
        return self.batch.layout.name(int(self.slots[position]))


def require_whole_warps(lanes: Lanes, what: str) -> None:
    if not lanes.whole_warps:
        at = int(np.flatnonzero(np.diff(lanes.slots, append=-9) != 1)[0])
        raise ProgramError(
            f"{what} needs all lanes of a warp, some are missing at {lanes.name(at)}"
        )
