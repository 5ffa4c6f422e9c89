"""Gradients of the symmetric contrastive loss from its log-sum-exps.

With z_ij = scale * <x_i, y_j> and weights (w_row, w_col), the gradient of the logits is
    g_ij = w_row * exp(z_ij - row_lse_i) + w_col * exp(z_ij - col_lse_j)
but for the positives, j = i + offset: theirs are small differences from 1 and are passed in. Then
dX = scale * g @ Y, dY = scale * g.T @ X, dscale = sum_ij g_ij <x_i, y_j>. For a chunk of rows one
kernel recomputes z, sums its tile's terms of dscale and writes g in the input's dtype to a
workspace, then two vendor GEMMs follow: three in all, with no accumulator of width D in registers
and no atomics.

Range: g is stored divided by the largest |weight|, hence within [-2, 2] whatever the batch size
and the upstream gradient, and in float16 times 2**14 besides, so that a probability of 4e-9 is
still a normal number. The factor returns in fp32, after the GEMMs.
"""

import torch
import triton
import triton.language as tl

from .._core import aot
from .._core.launch import (
    Tile,
    aligned_rows,
    gradient_workspace,
    launch,
    launch_options,
    on_device,
    require_supported,
    rows_per_chunk,
    tile_cases,
    tile_constants,
    tile_for,
    tiles_of,
)
from .._core.support import storage_factor
from .._core.tiles import (
    column_halves,
    dot_tile,
    exp_difference,
    has_pairs,
    own_tile,
    row_products,
    store_gradients,
)
from .gradient_sums import GradientSums

# The largest tiles whose epilogue fits the registers, or of which two fit a multiprocessor, one in
# its GEMM while the other writes: they wait for L2, from which a tile reads its rows of X and Y.
TILES = {
    (80, 2): Tile(128, 64, 64, 8, 4, 3),
    (90, 2): Tile(128, 256, 64, 8, 8, 3),
    (100, 2): Tile(128, 128, 64, 8, 8, 3),
    (120, 2): Tile(128, 64, 64, 8, 4, 3),
    (80, 4): Tile(64, 64, 32, 8, 4, 3),
    (90, 4): Tile(64, 64, 32, 8, 4, 3),
    (100, 4): Tile(64, 64, 32, 8, 8, 3),
    (120, 4): Tile(64, 64, 32, 8, 4, 3),
}


@triton.jit
def load_log_sum_exps(lse_ptr, at, weight):
    """Log-sum-exps rounded to float32, and `weight` times exp(-what the rounding left out).

    Left in, the rounding would scale the softmax of a whole row or column: at 100 by 4e-6, all
    terms alike. It is so small that 1 - x does for exp(-x). For half precision, where each term is
    rounded a thousand times more coarsely, they come in float32, and the weight stays one number.
    """
    lse = tl.load(lse_ptr + at)
    near = lse.to(tl.float32)
    if lse_ptr.dtype.element_ty == tl.float64:
        rest = (lse - near.to(tl.float64)).to(tl.float32)
        weight = weight * (1.0 - tl.where(rest == rest, rest, 0.0))  # infinity minus itself
    else:
        weight = tl.broadcast_to(weight, at.shape)
    return near, weight


@triton.jit
def logit_gradients(
    similarity, scale, w_row, w_col, row_lse_ptr, col_lse_ptr, positive, g_ptr, row, col,
    first_col, M, N, stride_g, offset, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Stores g of a part of a tile, from column `first_col` on; each row's sum of g times
    similarities."""
    z = scale * similarity
    # An exponential for each direction, as in the statistics: no reference serves both wherever
    # the features lie.
    row_at, col_at = tl.minimum(row, M - 1), tl.minimum(col, N - 1)
    if ROWS and COLS:
        row_lse, w_row = load_log_sum_exps(row_lse_ptr, row_at, w_row)
        col_lse, w_col = load_log_sum_exps(col_lse_ptr, col_at, w_col)
        g = w_row[:, None] * exp_difference(z, row_lse[:, None])
        g += w_col[None, :] * exp_difference(z, col_lse[None, :])
    elif ROWS:
        row_lse, w_row = load_log_sum_exps(row_lse_ptr, row_at, w_row)
        g = w_row[:, None] * exp_difference(z, row_lse[:, None])
    else:
        col_lse, w_col = load_log_sum_exps(col_lse_ptr, col_at, w_col)
        g = w_col[None, :] * exp_difference(z, col_lse[None, :])
    if has_pairs(row, col, first_col, offset):
        g = tl.where(col[None, :] == (row + offset)[:, None], positive[:, None], g)

    terms = row_products(g, similarity, first_col, col, N)
    store_gradients(g_ptr, g, row, col, M, N, stride_g)
    return tl.where(row < M, terms, 0.0)


@triton.jit(do_not_specialize=["M", "N", "offset"])
def gradient_kernel(
    x_ptr, y_ptr, scale_ptr, weights_ptr, row_lse_ptr, col_lse_ptr, positive_ptr, g_ptr, terms_ptr,
    M, N, D, stride_x, stride_y, stride_g, offset,
    ROWS: tl.constexpr, COLS: tl.constexpr, FACTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    EVEN_K: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of g * FACTOR / max|weights| to [M, N]; its sum times similarities to [program]."""
    _, block_n, row, col = own_tile(M, N, BLOCK_M, BLOCK_N, GROUP)
    w_row, w_col = tl.load(weights_ptr), tl.load(weights_ptr + 1)
    largest = tl.maximum(tl.abs(w_row), tl.abs(w_col))
    # All weights 0 means g = 0, not 0 / 0.
    largest = tl.where(largest == 0, 1.0, largest)
    w_row, w_col = w_row / largest * FACTOR, w_col / largest * FACTOR

    similarity = dot_tile(
        x_ptr, y_ptr, row, col, M, N, D, stride_x, stride_y,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, UPCAST, PRECISION,
    )  # fmt: skip
    scale = tl.load(scale_ptr)
    positive = tl.load(positive_ptr + tl.minimum(row, M - 1)) / largest * FACTOR
    # One quarter after the other: what is made of all at once would not fit the registers.
    terms = tl.zeros((BLOCK_M,), tl.float32)
    halves = column_halves(similarity)
    for part in tl.static_range(4):
        quarter = column_halves(halves[part // 2])[part % 2]
        first_col = block_n * BLOCK_N + part * (BLOCK_N // 4)
        terms += logit_gradients(
            quarter, scale, w_row, w_col, row_lse_ptr, col_lse_ptr, positive, g_ptr, row,
            first_col + tl.arange(0, BLOCK_N // 4), first_col, M, N, stride_g, offset, ROWS, COLS,
        )  # fmt: skip
    program = tl.program_id(0) + tl.arange(0, 1)
    tl.store(terms_ptr + program, tl.sum(tl.expand_dims(terms, 1), 0))


def contrastive_gradients(
    x: torch.Tensor,
    y: torch.Tensor,
    scale: torch.Tensor,
    row_lse: torch.Tensor | None,
    col_lse: torch.Tensor | None,
    positive_gradient: torch.Tensor,
    weights: torch.Tensor,
    *,
    offset: int = 0,
    workspace_bytes: int,
    need_x: bool = True,
    need_y: bool = True,
    input_precision: str = "ieee",
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """dX [M, D] and dY [N, D] in the input's dtype, and dscale [] in fp32; accumulated in fp32.

    x, y, scale, offset, input_precision: as in `contrastive_statistics`. row_lse [M] and
    col_lse [N]: float64, over all logits, of every rank where they are spread over several; None
    leaves that term out (give it the weight 0). positive_gradient [M]: with respect to the
    positives' logits.
    weights: float32 tensor (w_row, w_col) on the device, upstream gradient included.
    `workspace_bytes` bounds the chunk of g; the GEMMs take 4 bytes for each element of dY and 8
    for each of the chunk's dX besides.

    Returns (dX, dY, dscale), None for what is not needed; dscale comes with dX. Raises ValueError
    when the inputs are not taken, when both log-sum-exps are None or when the workspace holds not
    even one row.
    """
    statistics = {"row_lse": row_lse, "col_lse": col_lse}
    statistics = {k: v for k, v in statistics.items() if v is not None}
    scalars = {"scale": scale, "weights": weights, "positive_gradient": positive_gradient}
    require_supported(x, y, **scalars)
    require_supported(x, y, torch.float64, **statistics)
    if not statistics:
        raise ValueError("row_lse and col_lse are both None; give at least one")
    m, n = x.shape[0], y.shape[0]
    if m == 0 or n == 0 or not (need_x or need_y):
        return (
            x.new_zeros(x.shape) if need_x else None,
            y.new_zeros(y.shape) if need_y else None,
            x.new_zeros((), dtype=torch.float32) if need_x else None,
        )

    tile = tile_for(TILES, x)
    height = rows_per_chunk(m, n, x.element_size(), workspace_bytes, tile)
    workspace = gradient_workspace(x, height, n)
    stored = storage_factor(x.dtype)
    sums = GradientSums(x, y, scale, weights.abs().amax() / stored, need_x, need_y)
    rows_x, rows_y = aligned_rows(x), aligned_rows(y)
    if x.dtype != torch.float32:
        row_lse, col_lse = (None if lse is None else lse.float() for lse in (row_lse, col_lse))
    inner = rows_x.shape[1]
    constants = {"ROWS": row_lse is not None, "COLS": col_lse is not None, "FACTOR": stored}
    constants |= tile_constants(tile, inner, x.dtype, input_precision)
    options = launch_options(tile)
    with on_device(x):
        for first in range(0, m, height):
            g = workspace[: m - first]
            tiles = tiles_of(len(g), n, tile)
            terms = torch.empty(tiles, dtype=torch.float32, device=x.device)
            launch(
                gradient_kernel, tiles,
                {"x_ptr": rows_x[first:], "y_ptr": rows_y, "scale_ptr": scale,
                 "weights_ptr": weights,
                 "row_lse_ptr": weights if row_lse is None else row_lse[first:],
                 "col_lse_ptr": weights if col_lse is None else col_lse,
                 "positive_ptr": positive_gradient[first:], "g_ptr": g, "terms_ptr": terms},
                {"M": len(g), "N": n, "D": inner, "stride_x": rows_x.stride(0),
                 "stride_y": rows_y.stride(0), "stride_g": g.stride(0), "offset": offset + first},
                constants, options,
            )  # fmt: skip
            sums.add(first, g, terms)
    return sums.results()


def aot_cases() -> list[aot.Case]:
    """Every configuration of the gradient kernel, for ahead-of-time compilation."""
    types = dict.fromkeys(["weights_ptr", "positive_ptr", "terms_ptr"], "*fp32")
    types |= {"g_ptr": "*T", "stride_g": "i32"}
    half, single = (
        {
            "kernel": gradient_kernel,
            "tiles": TILES,
            "signature": types | dict.fromkeys(["row_lse_ptr", "col_lse_ptr"], kind),
        }
        for kind in ("*fp32", "*fp64")
    )
    both = {"ROWS": True, "COLS": True, "FACTOR": 1.0}
    only_rows, only_cols = both | {"COLS": False}, both | {"ROWS": False}
    cases = tile_cases(**half, constants=both, types=["bf16", "fp16"])
    cases += tile_cases(**single, constants=both, types=["fp32"])
    cases += tile_cases(**half, constants=both, types=["bf16"], ragged=True)
    cases += tile_cases(**half, constants=only_rows, types=["bf16"], label="-rows")
    cases += tile_cases(**half, constants=only_cols, types=["bf16"], label="-cols")
    return cases
