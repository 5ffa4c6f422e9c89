"""Hard negatives of the momentum-contrastive step, sampled from the batch by their similarity.

The Gumbel-max trick samples column j of a row in proportion to exp(s_ij) in one pass over the
logits: the highest of s_ij + g_ij wins, with g the noise of a counter-based generator at (i, j), so
that the sample depends on the seed alone. Nothing of size B x B is kept.
"""

import torch
import triton
import triton.language as tl

from .._core import aot
from .._core.launch import launch_options
from .tiles import AOT_TILED, aot_kinds, load_rows, tile_constants, tile_of


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


@triton.jit(do_not_specialize=["B"])
def negatives_kernel(
    query_ptr, batch_ptr, ids_ptr, temperature_ptr, seed_ptr, negative_ptr,
    B, D, stride_query, stride_batch, stream,
    IDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_D: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Per row the admissible column of the batch with the highest perturbed logit, or -1."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    depth = tl.arange(0, BLOCK_K)
    inverse = 1.0 / tl.load(temperature_ptr)
    seed = tl.load(seed_ptr)
    best = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    negative = tl.full((BLOCK_M,), -1, tl.int32)
    for start in range(0, B, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for at in range(0, D, BLOCK_K):
            q = load_rows(query_ptr, row, B - 1, stride_query, at + depth, D, EVEN_D, UPCAST)
            k = load_rows(batch_ptr, column, B - 1, stride_batch, at + depth, D, EVEN_D, UPCAST)
            s = tl.dot(q, tl.trans(k), s, input_precision=PRECISION)
        columns = tl.broadcast_to(column[None, :], (BLOCK_M, BLOCK_N))
        rows = tl.broadcast_to(row[:, None], (BLOCK_M, BLOCK_N))
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


def sample_negatives(student, batch, ids, temperature, seed, stream, precision) -> torch.Tensor:
    """int64 [B]: for each row of `student` one of `batch`; `stream` tells the directions apart."""
    rows, width = student.shape
    tile = tile_of(student)
    negative = torch.empty(rows, dtype=torch.int64, device=student.device)
    negatives_kernel[(triton.cdiv(rows, tile.block_m),)](
        student, batch, ids, temperature, seed, negative, rows, width, student.stride(0),
        batch.stride(0), stream, IDS=ids.numel() > 0,
        **tile_constants(tile, width, student.dtype, precision), **launch_options(tile),
    )  # fmt: skip
    return negative


def aot_cases() -> list[aot.Case]:
    """Every configuration of the kernel above, for ahead-of-time compilation."""
    return aot_kinds(negatives_kernel, "negatives", ("bf16", "fp32"), AOT_TILED | {"IDS": True})
