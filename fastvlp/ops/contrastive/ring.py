"""The contrastive losses over ranks by a ring: shards of the text features pass from rank to rank.

See gather.py for what the ranks compute, and for the other schedule.
"""

import torch

from ...distributed import Ring, RingSum
from .blocks import (
    LogitBlock,
    SavedLogits,
    Sum,
    communication_dtypes,
    direction_weight,
    loss_share,
    no_gradients,
)
from .pairs import log_sum_exp, positive_gradient
from .plan import plan_for


def ring_shares(x, y, scale, shards, rows, cols, comm_dtype, gradients, workspace_bytes):
    """(loss, dx, dy, dscale) of this rank for the softmax loss."""
    ring = _SoftmaxRing(x, y, scale, shards, rows, cols, workspace_bytes, gradients)
    features_dtype, sums_dtype = communication_dtypes(comm_dtype, y)
    ring.statistics(y.to(features_dtype))
    loss = loss_share(ring.row_negatives, ring.col_negatives, ring.positive, shards, rows, cols)
    if gradients:
        dx, dy, dscale = ring.gradients(sums_dtype)
    else:
        dx, dy, dscale = no_gradients(x, y, scale)
    ring.logits.release()
    return loss, dx, dy, dscale


class _SoftmaxRing:
    """One direction round the ring for the statistics, the other for the gradients."""

    def __init__(self, x, y, scale, shards, rows, cols, workspace_bytes, gradients):
        self.x, self.y, self.scale, self.shards = x, y, scale, shards
        self.rows, self.cols = rows, cols
        self.last = shards.world_size - 1
        self.away, self.back = Ring(shards), Ring(shards, -1)
        # Two blocks save their logits: the own one, and of the others the last one forward, which
        # is the first one backward. The rest are computed again, in that one's place.
        others = {shards.sizes[self.away.holder(step)] for step in range(1, shards.world_size)}
        self.logits = SavedLogits(x, [{len(y)}, others], workspace_bytes, gradients)

    def _block(self, columns: torch.Tensor, holder: int) -> LogitBlock:
        own = holder == self.shards.rank
        columns = self.y if own else columns.to(self.x.dtype)
        slot = self.logits.slot(0 if own else 1, len(columns))
        begin = self.shards.offset_of(holder)
        return LogitBlock(self.x, columns, self.scale, self.shards.offset, begin, slot)

    def statistics(self, held: torch.Tensor) -> None:
        """Sets row_negatives, col_negatives and positive of this rank's own pairs."""
        col_lse = None
        for step in range(self.shards.world_size):
            in_flight = self.away.start(step, held, tag=1) if step < self.last else None
            block = self._block(held, self.away.holder(step))
            row_part, col_part, positive = block.statistics(self.rows, self.cols)
            if step == 0:
                self.own, self.row_negatives, self.positive = block, row_part, positive
            else:
                self.row_negatives = torch.logaddexp(self.row_negatives, row_part)
            if self.cols:  # follows its shard, and reaches the shard's owner after the last step
                col_lse = col_part if col_lse is None else torch.logaddexp(col_lse, col_part)
                col_lse = self.away.start(step, col_lse, tag=2).wait()
            held = in_flight.wait() if in_flight else held
        self.col_negatives = col_lse if self.cols else col_part
        self.held, self.block = held, block

    def gradients(self, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """(dx, dy, dscale); dy is communicated as `dtype`."""
        weight = direction_weight(self.shards, self.rows, self.cols)
        common = (
            positive_gradient(self.row_negatives, self.col_negatives, self.positive, weight),
            self.scale.new_full((2,), weight),
        )
        row_lse = log_sum_exp(self.row_negatives, self.positive)
        own_col_lse = log_sum_exp(self.col_negatives, self.positive)
        dx, dscale, dy = Sum(), Sum(), RingSum(self.back, dtype)
        # The shard that came last is at hand: the way back starts with it and ends at its owner.
        held, block, col_lse = self.held, self.block, own_col_lse
        if self.cols:
            col_lse = self.back.start(0, col_lse, tag=2).wait()
        for step in range(1, self.shards.world_size):
            outgoing = [held, col_lse][: 1 + self.cols] if step < self.last else []
            in_flight = [self.back.start(step, each, tag) for tag, each in enumerate(outgoing, 1)]
            if step > 1:
                block = self._block(held, self.back.holder(step))
                block.restore(self.rows, self.cols)
            part_dx, part_dy, part_dscale = block.gradients(row_lse, col_lse, *common)
            dx.add(part_dx)
            dscale.add(part_dscale)
            dy.add(step, part_dy)
            if in_flight:
                held, *received = (handle.wait() for handle in in_flight)
                col_lse = received[0] if self.cols else col_lse
        own_dx, own_dy, own_dscale = self.own.gradients(row_lse, own_col_lse, *common)
        dx.add(own_dx)
        dscale.add(own_dscale)
        own_dy = dy.reduce(own_dy)
        return dx.total.to(self.x.dtype), own_dy.to(self.y.dtype), dscale.total


def sigmoid_shares(x, y, scale, bias, shards, comm_dtype, gradients, workspace_bytes):
    """(loss, dx, dy, dscale, dbias) of this rank for the sigmoid loss, by the ring."""
    ring, last = Ring(shards), shards.world_size - 1
    weight = shards.world_size / shards.total
    loss, dx, dscale, dbias = Sum(), Sum(), Sum(), Sum()
    features_dtype, sums_dtype = communication_dtypes(comm_dtype, y)
    dy, held = RingSum(ring, sums_dtype), y.to(features_dtype)
    for step in range(shards.world_size):
        in_flight = ring.start(step, held, tag=1) if step < last else None
        columns = held.to(x.dtype) if step else y
        begin = shards.offset_of(ring.holder(step))
        part_loss, part_dx, part_dy, *scalars = _sigmoid_part(
            x, columns, scale, bias, weight, shards.offset - begin, gradients, workspace_bytes
        )
        for total, part in zip((loss, dscale, dbias), (part_loss, *scalars), strict=True):
            total.add(part)
        if gradients:
            dx.add(part_dx.float())
            if step == 0:
                own_dy = part_dy
            else:
                dy.add(step, part_dy)
        held = in_flight.wait() if in_flight else held
    if not gradients:
        return loss.total, *no_gradients(x, y, scale), dbias.total
    own_dy = dy.reduce(own_dy.float())
    return loss.total, dx.total.to(x.dtype), own_dy.to(y.dtype), dscale.total, dbias.total


def _sigmoid_part(x, y, scale, bias, weight, offset, gradients, workspace_bytes):
    """(loss, dx, dy, dscale, dbias) of these logits; 0 where there are none."""
    if not len(x) or not len(y):
        loss, dscale, dbias = (torch.zeros_like(scale) for _ in range(3))
        return loss, torch.zeros_like(x), torch.zeros_like(y), dscale, dbias
    plan = plan_for(x, len(y), workspace_bytes, keep=False)
    return torch.ops.fastvlp.contrastive_sigmoid(
        x, y, scale, bias, weight, offset, gradients, plan.block_rows, plan.block_cols,
        plan.chunk_rows, plan.chunk_cols,
    )  # fmt: skip
