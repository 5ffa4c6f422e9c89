"""Hard negatives of the momentum-contrastive step, sampled from the batch by their similarity.

The Gumbel-max trick samples column j of a row in proportion to exp(s_ij) in one pass over the
logits: the highest of s_ij + g_ij wins, with g the noise of a counter-based generator at (i, j), so
that the sample depends on the seed alone. Nothing of size B x B is kept.
"""

import triton
import triton.language as tl

from .tiles import load_rows

# Columns at a time: the generator's words of a block are in registers together with its logits.
COLUMNS = tl.constexpr(16)


@triton.jit
def gumbel_noise(seed, column, row, stream):
    """-log(-log(1 - v)) of 32 random bits v in (0, 1), with log(1 - v) exact for small v."""
    zero = tl.zeros_like(column).to(tl.uint32)
    bits, _, _, _ = tl.philox(seed, column.to(tl.uint32), row.to(tl.uint32), zero + stream, zero)
    # By halves: a conversion of unsigned words of the highest bit is not the same everywhere.
    high, low = (bits >> 16).to(tl.int32).to(tl.float32), (bits & 0xFFFF).to(tl.int32)
    v = tl.minimum((high * 65536.0 + low.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    rest = 1.0 - v
    # log(rest) / (rest - 1) is smooth, so its value at the rounded `rest` serves at the exact one.
    exponential = tl.where(rest == 1.0, v, -tl.log(rest) * (v / (1.0 - rest)))
    return -tl.log(exponential)


@triton.jit
def sample_negatives(
    query_ptr, batch_ptr, ids_ptr, inverse, seed_ptr, negative_ptr, row, B, D,
    stride_query, stride_batch, stream,
    IDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_D: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Per row the admissible column of the batch with the highest perturbed logit, or -1.

    inverse: of the temperature; stream: tells the directions apart.
    """
    depth = tl.arange(0, BLOCK_K)
    seed = tl.load(seed_ptr)
    best = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    negative = tl.full((BLOCK_M,), -1, tl.int32)
    for start in range(0, B, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        s = tl.zeros((BLOCK_M, COLUMNS), tl.float32)
        for at in range(0, D, BLOCK_K):
            q = load_rows(query_ptr, row, B - 1, stride_query, at + depth, D, EVEN_D, UPCAST)
            k = load_rows(batch_ptr, column, B - 1, stride_batch, at + depth, D, EVEN_D, UPCAST)
            s = tl.dot(q, tl.trans(k), s, input_precision=PRECISION)
        columns = tl.broadcast_to(column[None, :], (BLOCK_M, COLUMNS))
        rows = tl.broadcast_to(row[:, None], (BLOCK_M, COLUMNS))
        score = s * inverse + gumbel_noise(seed, columns, rows, stream)
        admissible = (columns < B) & (columns != rows) & (score == score)
        if IDS:
            row_id = tl.load(ids_ptr + tl.minimum(row, B - 1))
            column_id = tl.load(ids_ptr + tl.minimum(column, B - 1))
            admissible = admissible & (row_id[:, None] != column_id[None, :])
        score = tl.where(admissible, score, -float("inf"))
        highest = tl.max(score, 1)
        where = tl.where(score == highest[:, None], columns, 2147483647)
        better = highest > best
        negative = tl.where(better, tl.min(where, 1), negative)
        best = tl.where(better, highest, best)
    tl.store(negative_ptr + row, negative.to(tl.int64), mask=row < B)
