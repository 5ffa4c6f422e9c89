"""Contrastive statistics and gradients of local rows against one part of the columns.

What the schedules of the distributed loss are made of.
"""

import torch

from ._contrastive_plan import make_plan
from ._workspace import Lease


class Part:
    """The logits of `x` [M, D] against `y` [N, D], columns `first` onward of the global batch.

    The positive of local row i is global column `positive` + i.
    """

    def __init__(self, x, y, scale, positive: int, first: int, workspace_bytes: int, keep: bool):
        self.x, self.y, self.scale = x, y, scale
        self.first, self.offset = first, positive - first
        keep = keep and x.device.type == "cpu"
        self.plan = make_plan(len(x), len(y), x.shape[1], x.dtype, workspace_bytes, keep)
        self.kept = Lease(self.plan.kept_floats(len(y)) if keep else 0)

    def statistics(self, rows: bool, cols: bool):
        """(row_lse [M], col_lse [N], positive [M]); empty where not wanted, 0 where not here."""
        plan = self.plan
        return torch.ops.fastvlp.contrastive_statistics(
            self.x, self.y, self.scale, self._kept(), self.offset, rows, cols, plan.block_rows,
            plan.block_cols, plan.keep_blocks,
        )  # fmt: skip

    def gradients(self, row_lse, col_lse, weights):
        """(dx, dy, dscale) as float32, to be summed over parts; gives up the kept logits."""
        plan = self.plan
        dx, dy, dscale = torch.ops.fastvlp.contrastive_gradients(
            self.x, self.y, self.scale, row_lse, col_lse, weights, self._kept(), self.offset,
            plan.block_rows, plan.block_cols, plan.keep_blocks, plan.chunk_rows, plan.chunk_cols,
        )  # fmt: skip
        self.kept.give_back()
        return dx.float(), dy.float(), dscale

    def _kept(self) -> torch.Tensor:
        return self.kept.floats.to(self.x.device)  # on a GPU nothing is kept: no floats move
