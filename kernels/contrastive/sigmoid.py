"""Sigmoid contrastive loss (SigLIP) and its gradients in one pass.

With z_ij = scale * <x_i, y_j> + bias and t_ij = 1 on the pairs j = i + offset, -1 elsewhere, the
loss is -sum_ij log sigmoid(t_ij * z_ij) (arXiv 2303.15343, section 3.2; the paper divides by the
number of rows). Its gradient for a logit is sigmoid(z) - [j = i + offset], which needs no
statistic of the whole matrix: a chunk of rows makes the loss and g together and two vendor GEMMs
follow, three GEMMs in all.

g lies within [-1, 1]. In float16 it is stored times 2**14, so that 4e-9 is still a normal number;
the factor leaves in fp32, after the GEMMs.
"""

from typing import NamedTuple

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
    LOG2E,
    column_halves,
    dot_tile,
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
    (100, 4): Tile(64, 64, 32, 8, 4, 3),
    (120, 4): Tile(64, 64, 32, 8, 4, 3),
}


class SigmoidContrastive(NamedTuple):
    """Results of `sigmoid_contrastive`. The sums run over the whole [M, N] matrix."""

    loss_sum: torch.Tensor
    g_sum: torch.Tensor
    dx: torch.Tensor | None
    dy: torch.Tensor | None
    dscale: torch.Tensor | None


@triton.jit
def log1p_unit(e):
    """log(1 + e) for e in [0, 1], within 1.4e-7 of it relatively.

    e times the polynomial through log(1 + e) / e at ten Chebyshev points. The logarithm itself
    would lose every e below 6e-8, and the loss is mostly a sum of many tiny terms.
    """
    p = -0.00317605701
    p = p * e + 0.0195425283
    p = p * e - 0.0563736148
    p = p * e + 0.105436236
    p = p * e - 0.152696669
    p = p * e + 0.196632743
    p = p * e - 0.249516159
    p = p * e + 0.333297104
    p = p * e - 0.499998927
    return (p * e + 1.0) * e


@triton.jit
def losses_and_gradients(z, row, col, first_col, M, N, offset):
    """Losses and gradients of a part of a tile of logits, 0 in the lanes past the end."""
    # u = -t * z: loss = softplus(u), and g = -t * sigmoid(u), which keeps the small differences
    # from 1 that sigmoid(z) - 1 would cancel.
    u = z
    here = has_pairs(row, col, first_col, offset)
    if here:
        u = tl.where(col[None, :] == (row + offset)[:, None], -u, u)
    if (first_col + col.shape[0] > N) | (tl.max(row, 0) >= M):
        u = tl.where((row < M)[:, None] & (col < N)[None, :], u, -float("inf"))
    e = tl.exp2(-tl.abs(u) * LOG2E)
    # A comparison and a selection, where a maximum could drop a NaN.
    loss = tl.where(u < 0, 0.0, u) + log1p_unit(e)
    g = tl.where(u < 0, e, 1.0) / (1.0 + e)
    if here:
        g = tl.where(col[None, :] == (row + offset)[:, None], -g, g)
    return loss, g


@triton.jit(do_not_specialize=["M", "N", "offset"])
def sigmoid_kernel(
    x_ptr, y_ptr, scale_ptr, bias_ptr, g_ptr, loss_ptr, g_sum_ptr, terms_ptr,
    M, N, D, stride_x, stride_y, stride_g, offset,
    STORE: tl.constexpr, FACTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    EVEN_K: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile: its sums of losses and of g to [program]; if STORE, g * FACTOR to [M, N], and its
    sum times the similarities to [program]."""
    _, block_n, row, col = own_tile(M, N, BLOCK_M, BLOCK_N, GROUP)
    similarity = dot_tile(
        x_ptr, y_ptr, row, col, M, N, D, stride_x, stride_y,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, UPCAST, PRECISION,
    )  # fmt: skip
    scale, bias = tl.load(scale_ptr), tl.load(bias_ptr)
    losses = tl.zeros((BLOCK_M,), tl.float32)
    gradients, terms = losses, losses
    # One quarter after the other: what is made of all at once would not fit the registers.
    halves = column_halves(similarity)
    for part in tl.static_range(4):
        quarter = column_halves(halves[part // 2])[part % 2]
        first_col = block_n * BLOCK_N + part * (BLOCK_N // 4)
        col = first_col + tl.arange(0, BLOCK_N // 4)
        loss, g = losses_and_gradients(bias + scale * quarter, row, col, first_col, M, N, offset)
        losses += tl.sum(loss, 1)
        gradients += tl.sum(g, 1)
        if STORE:
            g *= FACTOR
            terms += row_products(g, quarter, first_col, col, N)
            store_gradients(g_ptr, g, row, col, M, N, stride_g)
    program = tl.program_id(0) + tl.arange(0, 1)
    tl.store(loss_ptr + program, tl.sum(tl.expand_dims(losses, 1), 0))
    tl.store(g_sum_ptr + program, tl.sum(tl.expand_dims(gradients, 1), 0))
    if STORE:
        tl.store(terms_ptr + program, tl.sum(tl.expand_dims(terms, 1), 0))


def sigmoid_contrastive(
    x: torch.Tensor,
    y: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    *,
    offset: int = 0,
    weight: torch.Tensor | float = 1.0,
    need_gradients: bool = True,
    workspace_bytes: int,
    input_precision: str = "ieee",
) -> SigmoidContrastive:
    """Loss and gradients of the sigmoid contrastive loss.

    x [M, D] and y [N, D], one dtype of float32, bfloat16, float16, any stride between rows;
    scale and bias float32 tensors of one element on the same device. The pair of row i is
    column i + offset; a row whose i + offset lies outside [0, N) has negatives only.
    `workspace_bytes` bounds the chunk of g. `weight`, a number or a float32 tensor of one
    element, multiplies dx and dy in fp32 before they are rounded (1/M, times the upstream
    gradient): sums over N columns could leave float16 otherwise.

    Returns loss_sum (the sum of -log sigmoid(t z), without the weight), g_sum (the gradient of
    loss_sum for the bias), both float32 scalars, and dx [M, D], dy [N, D] in the input's dtype
    or None, and dscale, a float32 scalar with the weight, or None. Raises ValueError when the
    inputs are not taken or when the workspace holds not even one row.
    """
    require_supported(x, y, scale=scale, bias=bias)
    m, n = x.shape[0], y.shape[0]
    if m == 0 or n == 0:
        zeros = torch.zeros(3, dtype=torch.float32, device=x.device)
        loss_sum, g_sum, dscale = (zero.clone() for zero in zeros)
        if not need_gradients:
            return SigmoidContrastive(loss_sum, g_sum, None, None, None)
        dx, dy = torch.zeros_like(x), torch.zeros_like(y)
        return SigmoidContrastive(loss_sum, g_sum, dx, dy, dscale)

    tile = tile_for(TILES, x)
    height, workspace = m, x
    if need_gradients:
        height = rows_per_chunk(m, n, x.element_size(), workspace_bytes, tile)
        workspace = gradient_workspace(x, height, n)
    stored = storage_factor(x.dtype)
    gradients = GradientSums(x, y, scale, weight / stored, need_gradients, need_gradients)
    rows_x, rows_y = aligned_rows(x), aligned_rows(y)
    inner = rows_x.shape[1]
    constants = {"STORE": need_gradients, "FACTOR": stored}
    constants |= tile_constants(tile, inner, x.dtype, input_precision)
    options = launch_options(tile)
    tiles = [tiles_of(min(height, m - first), n, tile) for first in range(0, m, height)]
    sums = torch.empty(3, sum(tiles), dtype=torch.float32, device=x.device)
    with on_device(x):
        for index, first in enumerate(range(0, m, height)):
            g = workspace[: m - first]
            at = slice(sum(tiles[:index]), sum(tiles[: index + 1]))
            launch(
                sigmoid_kernel, tiles[index],
                {"x_ptr": rows_x[first:], "y_ptr": rows_y, "scale_ptr": scale, "bias_ptr": bias,
                 "g_ptr": g, "loss_ptr": sums[0, at], "g_sum_ptr": sums[1, at],
                 "terms_ptr": sums[2, at]},
                {"M": len(g), "N": n, "D": inner, "stride_x": rows_x.stride(0),
                 "stride_y": rows_y.stride(0), "stride_g": g.stride(0), "offset": offset + first},
                constants, options,
            )  # fmt: skip
            if need_gradients:
                gradients.add(first, g, sums[2, at])
    loss_sum, g_sum = sums[:2].sum(1, dtype=torch.float64).float()
    return SigmoidContrastive(loss_sum, g_sum, *gradients.results())


def aot_cases() -> list[aot.Case]:
    """Every configuration of the sigmoid kernel, for ahead-of-time compilation."""
    types = dict.fromkeys(["bias_ptr", "loss_ptr", "g_sum_ptr", "terms_ptr"], "*fp32")
    types |= {"g_ptr": "*T", "stride_g": "i32"}
    gradients = {"STORE": True, "FACTOR": 1.0}
    tiles = {"kernel": sigmoid_kernel, "tiles": TILES, "signature": types}
    cases = tile_cases(**tiles, constants=gradients)
    cases += tile_cases(**tiles, constants=gradients, types=["bf16"], ragged=True)
    loss_only = gradients | {"STORE": False}
    cases += tile_cases(**tiles, constants=loss_only, types=["bf16"], label="-loss")
    return cases
