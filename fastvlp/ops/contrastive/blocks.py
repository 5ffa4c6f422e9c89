"""What the schedules of the distributed loss are made of.

Contrastive statistics and gradients of local rows against one block of the columns, and how they
add up to this rank's share.
"""

from dataclasses import replace

import torch

from .._core.workspace import Workspace
from .pairs import pair_losses
from .plan import DEFAULT_WORKSPACE_BYTES, Plan, plan_for


class SavedLogits:
    """One workspace for the logits that blocks save from statistics to gradients.

    `slots` lists for each piece of the workspace the numbers of columns that blocks will bring to
    it, one block at a time; a slot's share of `workspace_bytes` follows its largest block. On a
    GPU nothing is saved: each block has the whole workspace while it is at work.
    """

    def __init__(
        self, x: torch.Tensor, slots: list[set[int]], workspace_bytes: int | None, keep: bool
    ):
        widest = [max(columns) for columns in slots]
        self._plans: list[dict[int, Plan]] = []
        for columns, most in zip(slots, widest, strict=True):
            share = workspace_bytes
            if not x.is_cuda:
                whole = DEFAULT_WORKSPACE_BYTES if share is None else share
                share = max(1, whole * most // sum(widest))
            self._plans.append({n: plan_for(x, n, share, keep) for n in columns})
        sizes = [max(p.kept_floats(n) for n, p in plans.items()) for plans in self._plans]
        self._workspace, floats = None, x.new_empty(0, dtype=torch.float32)
        if x.device.type == "cpu":  # a GPU saves nothing
            self._workspace = Workspace(sum(sizes))
            floats = self._workspace.floats
        self._pieces = floats.split(sizes)

    def slot(self, index: int, columns: int) -> tuple[Plan, torch.Tensor]:
        """How to cut a block with so many columns, and where its logits are saved."""
        plan = self._plans[index][columns]
        return plan, self._pieces[index][: plan.kept_floats(columns)]

    def release(self) -> None:
        """Lets the next step have the workspace."""
        self._pieces = ()
        if self._workspace is not None:
            self._workspace.release()


class LogitBlock:
    """The logits of `x` [M, D] against `y` [N, D], columns `first` onward of the global batch.

    The positive of local row i is global column `positive` + i. `slot`: of a SavedLogits.
    """

    def __init__(self, x, y, scale, positive: int, first: int, slot: tuple[Plan, torch.Tensor]):
        self.x, self.y, self.scale = x, y, scale
        self.first, self.offset = first, positive - first
        self.plan, self._saved = slot

    def statistics(self, rows: bool, cols: bool):
        """(log-sum-exps over the negatives of rows [M] and of columns [N], positive [M]).

        Log-sum-exps are empty where not wanted, positives 0 where they are not here.
        """
        if not self._has_logits():
            lse = [self.x.new_full((len(t) * on,), -torch.inf, dtype=torch.float64)
                   for t, on in ((self.x, rows), (self.y, cols))]  # fmt: skip
            return *lse, self.x.new_zeros(len(self.x), dtype=torch.float32)
        plan = self.plan
        return torch.ops.fastvlp.contrastive_statistics(
            self.x, self.y, self.scale, self._saved, self.offset, rows, cols, plan.block_rows,
            plan.block_cols, plan.keep_blocks,
        )  # fmt: skip

    def restore(self, rows: bool, cols: bool) -> None:
        """Prepares for gradients where another block has used the slot since the statistics."""
        if self.plan.keep_blocks * self.plan.block_rows >= len(self.x):
            self.statistics(rows, cols)
        else:  # some are computed again anyway: then all of them, without a pass for statistics
            self.plan, self._saved = replace(self.plan, keep_blocks=0), self._saved[:0]

    def gradients(self, row_lse, col_lse, positive_gradient, weights):
        """(dx, dy, dscale) as float32, to be summed over blocks.

        Log-sum-exps over all logits; `positive_gradient` [M] is used where the positives are here.
        """
        if not self._has_logits():
            return (
                *(torch.zeros_like(t, dtype=torch.float32) for t in (self.x, self.y, self.scale)),
            )
        plan = self.plan
        dx, dy, dscale = torch.ops.fastvlp.contrastive_gradients(
            self.x, self.y, self.scale, row_lse, col_lse, positive_gradient, weights, self._saved,
            self.offset, plan.block_rows, plan.block_cols, plan.keep_blocks, plan.chunk_rows,
            plan.chunk_cols,
        )  # fmt: skip
        return dx.float(), dy.float(), dscale

    def _has_logits(self) -> bool:
        return len(self.x) > 0 and len(self.y) > 0


class Sum:
    """A running sum that takes over its first term, so that no zeros are made and added."""

    total: torch.Tensor | None = None

    def add(self, part: torch.Tensor) -> None:
        self.total = part if self.total is None else self.total.add_(part)


def loss_share(row_negatives, own_col_negatives, positive, shards, rows, cols):
    directions = ((row_negatives, rows), (own_col_negatives, cols))
    sums = [pair_losses(negatives, positive).sum() for negatives, on in directions if on]
    return sum(sums) * (shards.world_size / (shards.total * len(sums)))


def direction_weight(shards, rows, cols) -> float:
    """What the softmax of each direction with a loss weighs in this rank's share."""
    return shards.world_size / (shards.total * (rows + cols))


def no_gradients(x, y, scale):
    return x.new_empty(0, x.shape[1]), y.new_empty(0, y.shape[1]), torch.zeros_like(scale)


def communication_dtypes(
    comm_dtype: torch.dtype | None, y: torch.Tensor
) -> tuple[torch.dtype, ...]:
    """The dtypes in which features and the sums of their gradients are communicated."""
    return comm_dtype or y.dtype, comm_dtype or torch.float32
