"""The contrastive losses over a global batch spread on the ranks of a process group.

Rank r holds B_r pairs of the N. It computes its own rows of logits against all columns, so row
log-sum-exps are final locally and column log-sum-exps need one merge of N floats, and gradients the
N positives' logits; only the text features are communicated. Loss and gradients come out of one
operator: nothing but gradients of the size of the local features lives until backward, and backward
needs no communication.

Two schedules, exact alike:
- gather: all-gather of the text features, the local block computed meanwhile; the gradient of the
  gathered features is reduce-scattered to their owners, the local block again computed meanwhile.
  2 N D elements on the wire in all, N D memory.
- ring: one shard at a time, the next one in flight during the current GEMM. Backward goes the
  other way round, from the shard at hand, and a shard's gradient collects its terms on the way to
  its owner. 3 N D elements on the wire (2 N D on two ranks), memory for a few shards and the logits
  of two blocks whatever the number of ranks.

Every rank returns W/N times its share of the sum (with equal shards the mean over its own pairs, as
open_clip's local loss), and W times the derivative of the global mean w.r.t. its features: what
averaging over ranks, as DDP does, turns into the exact gradient of the full batch.
"""

import torch

from ...distributed import Gather, ScatterSum, merge_log_sum_exp
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
from .plan import DEFAULT_WORKSPACE_BYTES
from .ring import ring_shares

SCHEDULES = ("auto", "gather", "ring")
# The communication dtypes by the number that ranks compare; None: the features' own.
COMM_DTYPES = (None, torch.bfloat16, torch.float16, torch.float32)


def softmax_shares(
    x, y, scale, shards, rows, cols, schedule, comm_dtype, gradients, workspace_bytes
) -> tuple[torch.Tensor, ...]:
    """(loss, dx, dy, dscale) of this rank; gradients empty where not wanted."""
    if schedule == "auto":
        gathered = shards.total * x.shape[1] * (x.element_size() + 4)
        # Not by a GPU's free memory, which differs between ranks.
        budget = DEFAULT_WORKSPACE_BYTES if workspace_bytes is None else workspace_bytes
        schedule = "gather" if gathered <= 4 * budget else "ring"
    run = _gather if schedule == "gather" else ring_shares
    return run(x, y, scale, shards, rows, cols, comm_dtype, gradients, workspace_bytes)


def _gather(x, y, scale, shards, rows, cols, comm_dtype, gradients, workspace_bytes):
    first, last = shards.offset, shards.offset + len(y)
    # At most three blocks: this rank's own columns, those before and those after.
    groups = [(0, slice(0, shards.rank)), (last, slice(shards.rank + 1, None))]
    groups = [(begin, which) for begin, which in groups if any(shards.sizes[which])]
    widths = [len(y), *(sum(shards.sizes[which]) for _, which in groups)]
    logits = SavedLogits(x, [{n} for n in widths], workspace_bytes, gradients)

    features_dtype, sums_dtype = communication_dtypes(comm_dtype, y)
    exchange = Gather(y.to(features_dtype), shards)
    own = LogitBlock(x, y, scale, first, first, logits.slot(0, len(y)))
    row_part, own_cols, positive = own.statistics(rows, cols)
    positives = Gather(positive, shards) if gradients and cols else None
    row_parts, col_parts = [row_part], [own_cols]
    others = []
    for index, (begin, which) in enumerate(groups, 1):
        columns = exchange.rows(which).to(x.dtype)
        others.append(LogitBlock(x, columns, scale, first, begin, logits.slot(index, len(columns))))
        row_part, col_part, _ = others[-1].statistics(rows, cols)
        row_parts.append(row_part)
        col_parts.insert(0 if begin == 0 else len(col_parts), col_part)
    del exchange
    row_negatives = torch.stack(row_parts).logsumexp(0) if rows else row_parts[0]
    col_negatives = merge_log_sum_exp(torch.cat(col_parts), shards.group) if cols else col_parts[0]
    own_negatives = row_negatives, col_negatives[first:last]
    loss = loss_share(*own_negatives, positive, shards, rows, cols)
    if not gradients:
        logits.release()
        return loss, *no_gradients(x, y, scale)

    weight = direction_weight(shards, rows, cols)
    row_lse = log_sum_exp(row_negatives, positive)
    col_lse = log_sum_exp(col_negatives, positives.rows(slice(None))) if cols else col_negatives
    common = positive_gradient(*own_negatives, positive, weight), scale.new_full((2,), weight)
    dx, dscale = Sum(), Sum()
    outgoing = [y.new_empty(0, y.shape[1]) for _ in shards.sizes]
    for other, (begin, which) in zip(others, groups, strict=True):
        end = begin + len(other.y)
        part_dx, part_dy, part_dscale = other.gradients(row_lse, col_lse[begin:end], *common)
        dx.add(part_dx)
        dscale.add(part_dscale)
        outgoing[which] = part_dy.split(shards.sizes[which])
    exchange = ScatterSum(outgoing, shards, y.new_empty(0, y.shape[1], dtype=sums_dtype))
    own_dx, own_dy, own_dscale = own.gradients(row_lse, col_lse[first:last], *common)
    logits.release()
    dx.add(own_dx)
    dscale.add(own_dscale)
    return loss, dx.total.to(x.dtype), exchange.wait(own_dy).to(y.dtype), dscale.total
