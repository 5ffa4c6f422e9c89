"""In which order blocks and warps run, and when asynchronous work takes effect."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Schedule:
    """One of the executions that a GPU could make.

    warps: "together" runs all warps of a batch in step; "apart" runs one warp of each block until
    it must wait, then the next. order: "forward", "reverse" or "random" (by `seed`) order of the
    warps of a block and of the blocks. late: asynchronous copies and matrix products take effect
    when they are waited for, not at once. blocks_at_once bounds the blocks of a batch; where the
    order is not forward, a grid of several blocks takes at least two batches.
    """

    warps: str = "together"
    order: str = "forward"
    seed: int = 0
    late: bool = False
    blocks_at_once: int | None = None

    def __post_init__(self):
        if self.warps not in ("together", "apart"):
            raise ValueError(f"warps must be 'together' or 'apart', got {self.warps!r}")
        if self.order not in ("forward", "reverse", "random"):
            raise ValueError(f"order must be forward, reverse or random, got {self.order!r}")

    def block_order(self, count: int) -> np.ndarray:
        if self.order == "random":
            return np.random.default_rng(self.seed).permutation(count)
        return np.arange(count)[:: -1 if self.order == "reverse" else 1]

    def warp_order(self, blocks: np.ndarray, warps: int) -> np.ndarray:
        """[B, W]: the warps of the blocks with these numbers, in the order in which they run."""
        if self.order == "random":
            rows = [np.random.default_rng((self.seed, b)).permutation(warps) for b in blocks]
            return np.array(rows, np.int64).reshape(len(blocks), warps)
        forward = np.arange(warps)[:: -1 if self.order == "reverse" else 1]
        return np.tile(forward, (len(blocks), 1))

    def batch_size(self, blocks: int, most: int) -> int:
        size = min(most, self.blocks_at_once or most)
        if self.order != "forward":
            size = min(size, -(-blocks // 2))
        return max(1, size)


SCHEDULES = (
    Schedule(),
    Schedule(late=True),
    Schedule(warps="apart", late=True),
    Schedule(warps="apart", order="reverse", late=True),
    Schedule(warps="apart", order="random", seed=1, late=True),
)
