"""The contrastive losses over a global batch spread on the ranks of a process group.

Rank r holds B_r pairs of the N. It computes its own rows of logits against all columns, so row
log-sum-exps are final locally and column log-sum-exps need one merge of N floats; only the text
tower travels. Loss and gradients come out of one operator: nothing but gradients of the size of the
local features lives until backward, and backward needs no communication.

Two schedules, exact alike:
- gather: all-gather of the text features, the local block computed meanwhile; the gradient of the
  gathered features goes home by a reduce-scatter, the local block again computed meanwhile.
  2 N D elements on the wire in all, N D memory.
- ring: one shard at a time, the next one in flight during the current product; its gradient travels
  with it. 3 N D elements on the wire, memory for a few shards whatever the number of ranks.

Every rank returns W/N times its share of the sum (with equal shards the mean over its own pairs, as
open_clip's local loss), and W times the derivative of the global mean by its features: what
averaging over ranks, as DDP does, turns into the exact gradient of the full batch.
"""

import torch

from ..distributed import Gather, Ring, ScatterSum, merge_log_sum_exp
from ._contrastive_parts import Part
from ._contrastive_plan import make_plan

SCHEDULES = ("auto", "gather", "ring")
# The communication dtypes by the number that ranks compare; None: the features' own.
COMM_DTYPES = (None, torch.bfloat16, torch.float16, torch.float32)


def softmax_shares(
    x, y, scale, shards, rows, cols, schedule, wire, gradients, workspace_bytes
) -> tuple[torch.Tensor, ...]:
    """(loss, dx, dy, dscale) of this rank; gradients empty where not wanted."""
    if schedule == "auto":
        gathered = shards.total * x.shape[1] * (x.element_size() + 4)
        schedule = "gather" if gathered <= 4 * workspace_bytes else "ring"
    run = _gather if schedule == "gather" else _ring
    return run(x, y, scale, shards, rows, cols, wire, gradients, workspace_bytes)


def _gather(x, y, scale, shards, rows, cols, wire, gradients, workspace_bytes):
    first, total = shards.offset, shards.total

    def part(columns, begin):
        share = max(1, workspace_bytes * len(columns) // total)
        return Part(x, columns, scale, first, begin, share, gradients)

    exchange = Gather(y.to(wire), shards)
    own = part(y, first)
    row_lse, own_cols, positive = own.statistics(rows, cols)
    row_parts, col_parts = [row_lse], [own_cols]
    shard_list = [shard.to(x.dtype) for shard in exchange.wait()]
    # At most two more products: the columns before and after this rank's own.
    groups = [(0, slice(0, shards.rank)), (first + len(y), slice(shards.rank + 1, None))]
    others = [
        (part(torch.cat(shard_list[which]), begin), which)
        for begin, which in groups
        if any(shards.sizes[which])
    ]
    del shard_list, exchange
    for other, which in others:
        row_lse, col_lse, _ = other.statistics(rows, cols)
        row_parts.append(row_lse)
        col_parts.insert(0 if which.start == 0 else len(col_parts), col_lse)
    row_lse = torch.stack(row_parts).logsumexp(0) if rows else row_parts[0]
    col_lse = merge_log_sum_exp(torch.cat(col_parts), shards.group) if cols else col_parts[0]
    mine = slice(first, first + len(y))
    loss = _loss(row_lse, col_lse[mine], positive, shards, rows, cols)
    if not gradients:
        return loss, *_no_gradients(x, y, scale)

    weights = _weights(scale, shards, rows, cols)
    dx, dscale = torch.zeros_like(x, dtype=torch.float32), torch.zeros_like(scale)
    outgoing = [y.new_empty(0, y.shape[1]) for _ in shards.sizes]
    for other, which in others:
        begin = other.first
        part_dx, part_dy, part_dscale = other.gradients(
            row_lse, col_lse[begin : begin + len(other.y)], weights
        )
        dx += part_dx
        dscale = dscale + part_dscale
        outgoing[which] = part_dy.split(shards.sizes[which])
    exchange = ScatterSum(outgoing, shards, y.new_empty(0, y.shape[1], dtype=_sum_dtype(wire, y)))
    own_dx, own_dy, own_dscale = own.gradients(row_lse, col_lse[mine], weights)
    dy = exchange.wait(own_dy)
    return loss, (dx + own_dx).to(x.dtype), dy.to(y.dtype), dscale + own_dscale


def _ring(x, y, scale, shards, rows, cols, wire, gradients, workspace_bytes):
    ring, last = Ring(shards), shards.world_size - 1

    def part(columns, step):
        begin = shards.offset_of(ring.holder(step))
        own = columns.to(x.dtype) if step else y
        return Part(x, own, scale, shards.offset, begin, workspace_bytes, False)

    held, cols_seen = y.to(wire), None
    row_lse = positive = None
    for step in range(shards.world_size):
        passing = ring.start(step, held, tag=1) if step < last else None
        part_rows, part_cols, part_positive = part(held, step).statistics(rows, cols)
        row_lse = part_rows if row_lse is None else torch.logaddexp(row_lse, part_rows)
        positive = part_positive if positive is None else positive
        if cols:  # the columns' sums follow their shard and are home after the last step
            cols_seen = part_cols if step == 0 else torch.logaddexp(cols_seen, part_cols)
            cols_seen = ring.start(step, cols_seen, tag=2).wait()
        held = passing.wait() if passing else held
    col_lse = cols_seen if cols else part_cols
    loss = _loss(row_lse, col_lse, positive, shards, rows, cols)
    if not gradients:
        return loss, *_no_gradients(x, y, scale)

    weights = _weights(scale, shards, rows, cols)
    dx, dscale = torch.zeros_like(x, dtype=torch.float32), torch.zeros_like(scale)
    held, dy = y.to(wire), None
    for step in range(shards.world_size):
        passing = []
        if step < last:
            travellers = [held, col_lse] if cols else [held]
            passing = [ring.start(step, t, tag) for tag, t in enumerate(travellers, 1)]
        part_dx, part_dy, part_dscale = part(held, step).gradients(row_lse, col_lse, weights)
        dx += part_dx
        dscale = dscale + part_dscale
        dy = part_dy if step == 0 else dy.float() + part_dy
        dy = ring.start(step, dy.to(_sum_dtype(wire, y)), tag=3).wait()
        if passing:
            held, *moved = (one.wait() for one in passing)
            col_lse = moved[0] if cols else col_lse
    return loss, dx.to(x.dtype), dy.to(y.dtype), dscale


def sigmoid_shares(x, y, scale, bias, shards, wire, gradients, workspace_bytes):
    """(loss, dx, dy, dscale, dbias) of this rank for the sigmoid loss, by the ring."""
    ring, last = Ring(shards), shards.world_size - 1
    weight = shards.world_size / shards.total
    totals = [torch.zeros_like(scale) for _ in range(3)]  # loss, by scale, by bias
    dx, dy, held = torch.zeros_like(x, dtype=torch.float32), None, y.to(wire)
    for step in range(shards.world_size):
        passing = ring.start(step, held, tag=1) if step < last else None
        own = held.to(x.dtype) if step else y
        plan = make_plan(len(x), len(own), x.shape[1], x.dtype, workspace_bytes, keep=False)
        begin = shards.offset_of(ring.holder(step))
        loss, part_dx, part_dy, dscale, dbias = torch.ops.fastvlp.contrastive_sigmoid(
            x, own, scale, bias, weight, shards.offset - begin, gradients, plan.block_rows,
            plan.block_cols, plan.chunk_rows, plan.chunk_cols,
        )  # fmt: skip
        totals = [t + part for t, part in zip(totals, (loss, dscale, dbias), strict=True)]
        if gradients:
            dx += part_dx
            dy = part_dy.float() if step == 0 else dy.float() + part_dy
            dy = ring.start(step, dy.to(_sum_dtype(wire, y)), tag=3).wait()
        held = passing.wait() if passing else held
    if not gradients:
        return totals[0], *_no_gradients(x, y, scale), totals[2]
    return totals[0], dx.to(x.dtype), dy.to(y.dtype), totals[1], totals[2]


def _loss(row_lse, own_col_lse, positive, shards, rows, cols):
    sums = [(lse - positive).sum() for lse, on in ((row_lse, rows), (own_col_lse, cols)) if on]
    return sum(sums) * (shards.world_size / (shards.total * len(sums)))


def _weights(scale, shards, rows, cols):
    share = shards.world_size / shards.total
    return scale.new_tensor([share / (rows + cols), share / (rows + cols), share])


def _no_gradients(x, y, scale):
    return x.new_empty(0, x.shape[1]), y.new_empty(0, y.shape[1]), torch.zeros_like(scale)


def _sum_dtype(wire: torch.dtype, y: torch.Tensor) -> torch.dtype:
    # Sums travel in float32 unless the caller asked for less than the features' own precision.
    return wire if wire.itemsize < y.element_size() else torch.float32
