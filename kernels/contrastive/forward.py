"""Statistics of the logits of the symmetric contrastive loss (InfoNCE), in one GEMM.

z_ij = scale * <x_i, y_j>. One pass over tiles of z yields the log-sum-exp over the negatives of
every row and of every column and the logits of the positives; z itself is never stored. A tile
leaves, for each of its rows and columns, a pair (reference m, sum of exp(z - m)). Pairs merge in
any grouping, a second kernel merges them in a fixed order, and so the result is the same bit for
bit on every run.

Memory: the pairs, about `PAIR_BYTES` at most; taller inputs are walked in chunks of rows.
Work: 2*M*N*D FLOP and an exponential per logit and direction.
"""

import torch
import triton
import triton.language as tl

from .._core import aot
from .._core.launch import (
    CAPABILITIES,
    Tile,
    aligned_rows,
    ceil_div,
    launch,
    launch_options,
    on_device,
    require_supported,
    tile_cases,
    tile_constants,
    tile_for,
    tiles_of,
)
from .._core.tiles import dot_tile, exp_difference, has_pairs, own_tile
from .backward import contrastive_gradients
from .sigmoid import SigmoidContrastive, sigmoid_contrastive

__all__ = [
    "SigmoidContrastive",
    "contrastive_gradients",
    "contrastive_statistics",
    "sigmoid_contrastive",
]

PAIR_BYTES = 64 << 20
MERGE_LENGTH, MERGE_PARTS, MERGE_WARPS = 64, 32, 4
# The reference where there is nothing to sum: -inf is infinitely far below it, not NaN.
LOWEST = tl.constexpr(-3.4028234663852886e38)

# The largest tiles of which two or three fit a multiprocessor, one in its GEMM while another
# reduces: they wait for L2, from which a tile reads its rows of X and Y once. Four warps on 128
# rows own 32 rows each, which halves the shuffles of the column sums against eight; on Blackwell
# they would spill.
TILES = {
    (80, 2): Tile(128, 64, 64, 8, 4, 3),
    (90, 2): Tile(128, 128, 64, 8, 4, 3),
    (100, 2): Tile(128, 128, 64, 8, 8, 3),
    (120, 2): Tile(128, 64, 64, 8, 4, 3),
    (80, 4): Tile(64, 64, 32, 8, 8, 3),
    (90, 4): Tile(64, 64, 32, 8, 8, 3),
    (100, 4): Tile(64, 64, 32, 8, 8, 3),
    (120, 4): Tile(64, 64, 32, 8, 8, 3),
}


@triton.jit
def logits_tile(
    x_ptr, y_ptr, scale_ptr, row, col, M, N, D, stride_x, stride_y,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scale * X[row] @ Y[col].T, -inf in the lanes past the end."""
    z = tl.load(scale_ptr) * dot_tile(
        x_ptr, y_ptr, row, col, M, N, D, stride_x, stride_y,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, UPCAST, PRECISION,
    )  # fmt: skip
    if (tl.min(row, 0) + BLOCK_M > M) | (tl.min(col, 0) + BLOCK_N > N):
        z = tl.where((row < M)[:, None] & (col < N)[None, :], z, -float("inf"))
    return z


@triton.jit
def store_positives(
    positive_ptr, z, row, col, first, M, N, offset, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Each row's z[row, row + offset] by the tile that holds it; 0 where no tile does.

    The first column block writes those zeros, so that every row is written exactly once.
    """
    partner = row + offset
    absent = (partner < 0) | (partner >= N)
    here = (partner >= first) & (partner < first + BLOCK_N) & (partner < N)
    here = tl.where(first == 0, here | absent, here) & (row < M)
    if tl.max(here.to(tl.int32), 0) > 0:
        positive = tl.sum(tl.where(col[None, :] == partner[:, None], z, 0.0), 1)
        tl.store(positive_ptr + row, tl.where(absent, 0.0, positive), mask=here)


@triton.jit
def negatives_only(z, row, col, offset):
    """-inf in the positives' places: they add nothing to a sum of exponentials."""
    return tl.where(col[None, :] == (row + offset)[:, None], -float("inf"), z)


@triton.jit
def store_pairs(ref_ptr, sum_ptr, z, at, inside, AXIS: tl.constexpr):
    """Pairs of the rows (AXIS 1) or columns (AXIS 0), each with its own maximum as reference."""
    ref = tl.maximum(tl.max(z, AXIS), LOWEST)
    total = tl.sum(exp_difference(z, tl.expand_dims(ref, AXIS)), AXIS)
    tl.store(ref_ptr + at, ref, mask=inside)
    tl.store(sum_ptr + at, total, mask=inside)


@triton.jit(do_not_specialize=["M", "N", "offset"])
def statistics_kernel(
    x_ptr, y_ptr, scale_ptr, row_ref_ptr, row_sum_ptr, col_ref_ptr, col_sum_ptr, positive_ptr,
    M, N, D, stride_x, stride_y, offset,
    ROWS: tl.constexpr, COLS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    EVEN_K: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile: row pairs to [column block, M], column pairs to [row block, N], positives to [M].

    An exponential per logit and direction: one relative to the tile's maximum would serve both,
    but not where a row or column lies far below it, which of features in clusters most do.
    """
    block_m, block_n, row, col = own_tile(M, N, BLOCK_M, BLOCK_N, GROUP)
    z = logits_tile(
        x_ptr, y_ptr, scale_ptr, row, col, M, N, D, stride_x, stride_y,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, UPCAST, PRECISION,
    )  # fmt: skip
    store_positives(positive_ptr, z, row, col, block_n * BLOCK_N, M, N, offset, BLOCK_N)
    if has_pairs(row, col, block_n * BLOCK_N, offset):
        z = negatives_only(z, row, col, offset)

    row_in, col_in = row < M, col < N
    row_at = block_n.to(tl.int64) * M + row
    col_at = block_m.to(tl.int64) * N + col
    if ROWS:
        store_pairs(row_ref_ptr, row_sum_ptr, z, row_at, row_in, 1)
    if COLS:
        store_pairs(col_ref_ptr, col_sum_ptr, z, col_at, col_in, 0)


@triton.jit(do_not_specialize=["parts", "length"])
def merge_kernel(
    ref_ptr, sum_ptr, lse_ptr, carry_ref_ptr, carry_sum_ptr, parts, length,
    LAST: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Merge `parts` pairs per position, [parts, length] -> lse [length], or a carried pair."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < length
    ref = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        mask = (part < parts)[:, None] & inside[None, :]
        offset = part.to(tl.int64)[:, None] * length + at[None, :]
        refs = tl.load(ref_ptr + offset, mask=mask, other=-float("inf"))
        sums = tl.load(sum_ptr + offset, mask=mask, other=0.0)
        new = tl.maximum(ref, tl.max(refs, 0))
        total *= exp_difference(ref, new)
        total += tl.sum(sums * exp_difference(refs, new[None, :]), 0)
        ref = new
    if LAST:
        # In float64: added to a large reference the logarithm would lose what the sum is exact to.
        lse = ref.to(tl.float64) + tl.log(total.to(tl.float64))
        tl.store(lse_ptr + at, lse, mask=inside)
    else:
        tl.store(carry_ref_ptr + at, ref, mask=inside)
        tl.store(carry_sum_ptr + at, total, mask=inside)


def _merge(pairs: torch.Tensor, out: torch.Tensor, carry: torch.Tensor | None = None) -> None:
    """Merge pairs [2, parts, length] into the log-sum-exp `out` [length], or into a carried pair
    [2, length], which may be one of the parts: a program reads its positions before it writes."""
    _, parts, length = pairs.shape
    last = carry is None
    carry_ref, carry_sum = (out, out) if last else carry
    launch(
        merge_kernel, ceil_div(length, MERGE_LENGTH),
        {"ref_ptr": pairs[0], "sum_ptr": pairs[1], "lse_ptr": out, "carry_ref_ptr": carry_ref,
         "carry_sum_ptr": carry_sum},
        {"parts": parts, "length": length},
        {"LAST": last, "BLOCK": MERGE_LENGTH, "PARTS": MERGE_PARTS},
        {"num_warps": MERGE_WARPS, "enable_fp_fusion": True},
    )  # fmt: skip


def _chunk_height(m: int, n: int, rows: bool, cols: bool, tile: Tile) -> int:
    """Rows per launch, a multiple of the tile height, whose pairs take about PAIR_BYTES."""
    pairs_per_block = n * cols + tile.block_m * ceil_div(n, tile.block_n) * rows
    return tile.block_m * max(1, min(ceil_div(m, tile.block_m), PAIR_BYTES // 8 // pairs_per_block))


def contrastive_statistics(
    x: torch.Tensor,
    y: torch.Tensor,
    scale: torch.Tensor,
    *,
    offset: int = 0,
    rows: bool = True,
    cols: bool = True,
    input_precision: str = "ieee",
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
    """Log-sum-exps over the negatives, and positives, of z_ij = scale * <x_i, y_j>.

    x [M, D] and y [N, D], one dtype of float32, bfloat16, float16, any stride between rows;
    scale a float32 tensor of one element on the same device. The positive of row i is column
    i + offset. `rows` and `cols` choose what is wanted; at least one must be.
    `input_precision` matters for float32 inputs only: "ieee", or "tf32" for tensor cores.

    Returns (row_negatives [M], col_negatives [N]) in float64, None for what was not wanted, and
    positive [M] in float32. A row or column without negatives has -inf; positive is 0 where
    i + offset lies outside [0, N). A NaN in x_i makes row i, its positive and every other column
    NaN. Raises ValueError on inputs the kernels do not take.
    """
    require_supported(x, y, scale=scale)
    if not (rows or cols):
        raise ValueError("rows and cols are both False; at least one log-sum-exp must be wanted")
    m, n = x.shape[0], y.shape[0]
    if m == 0 or n == 0:
        lowest = [x.new_full((k,), -torch.inf, dtype=torch.float64) for k in (m, n)]
        return (
            lowest[0] if rows else None,
            lowest[1] if cols else None,
            x.new_zeros(m, dtype=torch.float32),
        )

    tile = tile_for(TILES, x)
    height = _chunk_height(m, n, rows, cols, tile)
    like = {"dtype": torch.float32, "device": x.device}
    positive = torch.empty(m, **like)
    row_negatives, col_negatives = (
        torch.empty(size, dtype=torch.float64, device=x.device) if wanted else None
        for size, wanted in ((m, rows), (n, cols))
    )
    # Slab 0 of the column pairs carries the merged pairs of the chunks before.
    row_parts = ceil_div(n, tile.block_n) if rows else 0
    col_parts = ceil_div(min(height, m), tile.block_m) + 1 if cols else 1
    row_pairs = torch.empty(2, row_parts * min(height, m), **like)
    col_pairs = torch.empty(2, col_parts, n, **like)
    x, y = aligned_rows(x), aligned_rows(y)
    width = x.shape[1]
    constants = tile_constants(tile, width, x.dtype, input_precision)
    options = launch_options(tile)
    with on_device(x):
        for first in range(0, m, height):
            chunk = x[first : first + height]
            count = chunk.shape[0]
            launch(
                statistics_kernel, tiles_of(count, n, tile),
                {"x_ptr": chunk, "y_ptr": y, "scale_ptr": scale,
                 "row_ref_ptr": row_pairs[0], "row_sum_ptr": row_pairs[1],
                 "col_ref_ptr": col_pairs[0, 1:], "col_sum_ptr": col_pairs[1, 1:],
                 "positive_ptr": positive[first:]},
                {"M": count, "N": n, "D": width, "stride_x": x.stride(0), "stride_y": y.stride(0),
                 "offset": offset + first},
                {"ROWS": rows, "COLS": cols} | constants, options,
            )  # fmt: skip
            if rows:
                _merge(
                    row_pairs[:, : row_parts * count].view(2, row_parts, count),
                    row_negatives[first:],
                )
            if cols:
                written = col_pairs[:, (first == 0) : 1 + ceil_div(count, tile.block_m)]
                last = first + height >= m
                _merge(written, col_negatives, None if last else col_pairs[:, 0])
    return row_negatives, col_negatives, positive


def aot_cases() -> list[aot.Case]:
    """Every configuration of the two kernels above, for ahead-of-time compilation."""
    pairs = dict.fromkeys(
        ["row_ref_ptr", "row_sum_ptr", "col_ref_ptr", "col_sum_ptr", "positive_ptr"], "*fp32"
    )
    both = {"ROWS": True, "COLS": True}
    only_rows, only_cols = both | {"COLS": False}, both | {"ROWS": False}
    tiles = {"kernel": statistics_kernel, "tiles": TILES, "signature": pairs}
    cases = tile_cases(**tiles, constants=both)
    cases += tile_cases(**tiles, constants=both, types=["bf16"], ragged=True)
    cases += tile_cases(**tiles, constants=only_rows, types=["bf16"], label="-rows")
    cases += tile_cases(**tiles, constants=only_cols, types=["bf16"], label="-cols")
    pointers = ["ref_ptr", "sum_ptr", "carry_ref_ptr", "carry_sum_ptr"]
    types = {"lse_ptr": "*fp64", "parts": "i32", "length": "i32"}
    cases += [
        aot.Case(
            name=f"merge {'last' if last else 'carry'} {MERGE_PARTS}x{MERGE_LENGTH}",
            kernel=merge_kernel,
            signature=dict.fromkeys(pointers, "*fp32") | types,
            constants={"LAST": last, "BLOCK": MERGE_LENGTH, "PARTS": MERGE_PARTS},
            capability=capability,
            warps=MERGE_WARPS,
            stages=3,
        )
        for capability in CAPABILITIES
        for last in (True, False)
    ]
    return cases
