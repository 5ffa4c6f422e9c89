"""Gradients of word-patch alignment: matmuls of the plan with the other side's unit vectors.

Half-precision features go through tensor cores as they are; the plan, times the factors that
normalise them, takes two bfloat16 parts. Both sides' gradients come from one launch.
"""

import torch
import triton
import triton.language as tl

from .._core import aot
from .._core.launch import (
    CAPABILITIES,
    INTERPRETED,
    Tile,
    capability_key,
    ceil_div,
    launch,
    launch_options,
    on_device,
)
from .transport import load_rows

# Not pipelined in half precision, as the cosines.
TILES = {
    torch.bfloat16: Tile(64, 64, 64, 1, 4, 1),
    torch.float16: Tile(64, 32, 32, 1, 4, 1),
    torch.float32: Tile(64, 32, 16, 1, 4, 2),
}
# By capability where it is another one: there the compiler has half the registers to give.
TILE_OF = {(100, torch.bfloat16): Tile(64, 32, 64, 1, 4, 1)}


@triton.jit
def multiply(weights, features, sums, UPCAST: tl.constexpr):
    """weights @ features + sums for float32 weights, on tensor cores for half precision features.

    Weights are the sum of two bfloat16 numbers to 2 ** -17 of themselves, and float16 features are
    so exactly: bfloat16 has the range of both.
    """
    if UPCAST or features.dtype == tl.float32:
        return tl.dot(weights, features.to(tl.float32), sums, input_precision="ieee")
    high = weights.to(tl.bfloat16)
    low = (weights - high.to(tl.float32)).to(tl.bfloat16)
    right = features.to(tl.bfloat16)
    sums = tl.dot(low, right, sums)
    if features.dtype == tl.float16:
        rest = (features.to(tl.float32) - right.to(tl.float32)).to(tl.bfloat16)
        sums = tl.dot(high, rest, sums)
    return tl.dot(high, right, sums)


@triton.jit(do_not_specialize=["X", "Y"])
def gradients_kernel(
    upstream_ptr, x_ptr, y_ptr, plan_ptr, x_rows_ptr, y_rows_ptr, dx_ptr, dy_ptr,
    X, Y, D, stride_xb, stride_xr, stride_yb, stride_yr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A tile of one side's gradient: pair program_id(0), columns program_id(1).

    program_id(2) counts the row blocks of x, whose sums are longer, then those of y. `own` is the
    side of the tile.
    """
    pair, pairs = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    block, x_blocks = tl.program_id(2), tl.cdiv(X, BLOCK_M)
    x_at, y_at = x_ptr + pair * stride_xb, y_ptr + pair * stride_yb
    x_stride, y_stride = tl.cast(stride_xr, tl.int64), tl.cast(stride_yr, tl.int64)
    if block < x_blocks:
        own_ptr, other_ptr, out_ptr, OWN, OTHER = x_at, y_at, dx_ptr, X, Y
        own_rows_ptr, other_rows_ptr = x_rows_ptr, y_rows_ptr
        own_stride, other_stride, plan_own, plan_other = x_stride, y_stride, Y, Y * 0 + 1
    else:
        block -= x_blocks
        own_ptr, other_ptr, out_ptr, OWN, OTHER = y_at, x_at, dy_ptr, Y, X
        own_rows_ptr, other_rows_ptr = y_rows_ptr, x_rows_ptr
        own_stride, other_stride, plan_own, plan_other = y_stride, x_stride, Y * 0 + 1, Y
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    plan_at = plan_ptr + pair * X * Y + row[:, None] * plan_own
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, OTHER, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = (row < OWN)[:, None] & (k < OTHER)[None, :]
        plan = tl.load(plan_at + k[None, :] * plan_other, mask=inside, other=0.0)
        factor = tl.load(other_rows_ptr + pair * OTHER + k, mask=k < OTHER, other=0.0)
        other = load_rows(other_ptr, k, other_stride, col, D, k < OTHER)
        other = tl.where((factor == 0)[:, None], 0.0, other).to(other.dtype)
        sums = multiply(plan * tl.abs(factor)[None, :], other, sums, UPCAST)
    at = own_rows_ptr + pair * OWN + row
    factor = tl.load(at, mask=row < OWN, other=0.0)
    share = tl.load(at + pairs * OWN, mask=row < OWN, other=0.0)
    share = tl.where(factor < 0, 0.0, share)
    factor = tl.abs(factor)
    own = load_rows(own_ptr, row, own_stride, col, D, row < OWN)
    sums -= own.to(tl.float32) * (factor * share)[:, None]
    gradient = sums * (-tl.load(upstream_ptr + pair) * factor)[:, None]
    gradient = tl.where((factor == 0)[:, None], 0.0, gradient)
    out_at = out_ptr + (pair * OWN + row)[:, None] * D + col[None, :]
    gradient = gradient.to(out_ptr.dtype.element_ty)
    tl.store(out_at, gradient, mask=(row < OWN)[:, None] & (col < D)[None, :])


def word_patch_alignment_gradients(
    upstream: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    plan: torch.Tensor,
    x_rows: torch.Tensor,
    y_rows: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients w.r.t. x and y in their dtype, from what `word_patch_alignment` returned."""
    # The interpreter truncates where it should round to bf16: there the results are rounded after.
    coarse = INTERPRETED and x.dtype is torch.bfloat16
    dtype = torch.float32 if coarse else x.dtype
    dx, dy = (torch.empty(t.shape, dtype=dtype, device=t.device) for t in (x, y))
    (pairs, words, width), patches = x.shape, y.shape[1]
    tile = _tile(
        0 if INTERPRETED else capability_key(*torch.cuda.get_device_capability(x.device)), x.dtype
    )
    row_blocks = ceil_div(words, tile.block_m) + ceil_div(patches, tile.block_m)
    if dx.numel() + dy.numel():
        with on_device(x):
            launch(
                gradients_kernel, (pairs, ceil_div(width, tile.block_n), row_blocks),
                {"upstream_ptr": upstream, "x_ptr": x, "y_ptr": y, "plan_ptr": plan,
                 "x_rows_ptr": x_rows, "y_rows_ptr": y_rows, "dx_ptr": dx, "dy_ptr": dy},
                {"X": words, "Y": patches, "D": width, "stride_xb": x.stride(0),
                 "stride_xr": x.stride(1), "stride_yb": y.stride(0), "stride_yr": y.stride(1)},
                {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
                 "UPCAST": INTERPRETED},
                launch_options(tile),
            )  # fmt: skip
    return dx.to(x.dtype), dy.to(y.dtype)


def _tile(capability: int, dtype: torch.dtype) -> Tile:
    return TILE_OF.get((capability, dtype), TILES[dtype])


def aot_cases() -> list[aot.Case]:
    """Every configuration of the kernel, for ahead-of-time compilation."""
    return [
        _case(capability, kind, _tile(capability, dtype))
        for capability in CAPABILITIES
        for kind, dtype in zip(("bf16", "fp16", "fp32"), TILES, strict=True)
    ]


def _case(capability: int, kind: str, tile: Tile) -> aot.Case:
    strides = [f"stride_{side}{axis}" for side in "xy" for axis in "br"]
    floats = ("upstream_ptr", "plan_ptr", "x_rows_ptr", "y_rows_ptr")
    return aot.Case(
        name=f"alignment gradients {kind} {tile.block_m}x{tile.block_n}x{tile.block_k}",
        kernel=gradients_kernel,
        signature={
            **dict.fromkeys(("x_ptr", "y_ptr", "dx_ptr", "dy_ptr"), f"*{kind}"),
            **dict.fromkeys(floats, "*fp32"),
            **dict.fromkeys(("X", "Y", "D", *strides), "i32"),
        },
        constants={
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
            "UPCAST": False,
        },
        capability=capability,
        warps=tile.warps,
        stages=tile.stages,
        aligned=("D", *strides),
        tensor_cores=kind != "fp32",
    )
