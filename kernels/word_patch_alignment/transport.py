"""Word-patch alignment (ViLT's optimal-transport distance): one program solves one pair.

The cosines of all pairs come from tiles of GEMMs; half-precision features go through tensor
cores and are normalised afterwards, which is exact to fp32 rounding: the products themselves are.
Then a program takes a pair through all its iterations with Q in registers. Gradients
are matmuls with the plan, in fp32.

The plan, [words, patches], and what the gradients need of each row leave the kernels: the factor
that normalises it (0 at padding, negative where only the smallest norm divides it) and its share,
the sum of plan times cosine.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .._core import aot
from .._core.launch import CAPABILITIES, INTERPRETED, UNFUSED, on_device
from .._core.support import alignment_block, alignment_supported, triton_before

LOG2E = 1.4426950408889634
SMALLEST_NORM = tl.constexpr(1e-5)


@dataclass(frozen=True)
class Launch:
    """Depth of a GEMM step, warps, pipeline stages."""

    block_k: int
    warps: int
    stages: int


BLOCK_ROWS, BLOCK_COLS = 64, 32  # of every GEMM's tile
# By bytes of a feature. Half precision is not pipelined: Triton's pipeline for sm_90 overwrites a
# tile that registers are loaded from while wgmma may still read it.
COSINE = {2: Launch(64, 4, 1), 4: Launch(32, 4, 2)}
GRADIENT = Launch(16, 4, 2)
# Of a pair's matrix that a thread keeps: where a Triton spills the least, docs/compatibility.md.
THREAD_ELEMENTS = 16 if triton_before(3, 8) else 32


@triton.jit
def load_rows(ptr, row, stride, depth, D, valid):
    """Elements [row, depth], 0 past the width and in rows that are not valid."""
    at = ptr + row.to(tl.int64)[:, None] * stride + depth[None, :]
    return tl.load(at, mask=valid[:, None] & (depth < D)[None, :], other=0.0)


@triton.jit
def balance(total, count):
    """1 / (count * total), and 0 for a sum of nothing."""
    return tl.where(total == 0.0, 0.0, 1.0 / (total * count))


@triton.jit
def is_valid(padding_ptr, row, rows):
    """Which of one pair's rows exist and are not padding."""
    return tl.load(padding_ptr + row, mask=row < rows, other=1) == 0


@triton.jit
def factor_of(square):
    return 1.0 / tl.maximum(tl.sqrt(square), SMALLEST_NORM)


@triton.jit
def store_factors(ptr, row, rows, square, valid):
    """The factor of each row, 0 at padding, and negative at the smallest norm: such a row is only
    scaled, so that nothing is taken off its gradient."""
    factor = factor_of(square)
    factor = tl.where(tl.sqrt(square) < SMALLEST_NORM, -factor, factor)
    tl.store(ptr + row, tl.where(valid, factor, 0.0), mask=row < rows)


@triton.jit
def cosine_kernel(
    x_ptr, y_ptr, x_padding_ptr, y_padding_ptr, plan_ptr, x_rows_ptr, y_rows_ptr,
    X, Y, D, stride_xb, stride_xr, stride_yb, stride_yr,
    PLAN_X: tl.constexpr, PLAN_Y: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Cosines of pair program_id(0), 0 at padding, to where its plan will be; rows' factors."""
    pair = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK_X + tl.arange(0, BLOCK_X)
    j = tl.program_id(2) * BLOCK_Y + tl.arange(0, BLOCK_Y)
    x_valid = is_valid(x_padding_ptr + pair * X, i, X)
    y_valid = is_valid(y_padding_ptr + pair * Y, j, Y)
    product = tl.zeros((BLOCK_X, BLOCK_Y), tl.float32)
    x_square = tl.zeros((BLOCK_X,), tl.float32)
    y_square = tl.zeros((BLOCK_Y,), tl.float32)
    for start in range(0, D, BLOCK_K):
        depth = start + tl.arange(0, BLOCK_K)
        x = load_rows(x_ptr + pair * stride_xb, i, stride_xr, depth, D, x_valid)
        y = load_rows(y_ptr + pair * stride_yb, j, stride_yr, depth, D, y_valid)
        x_wide, y_wide = x.to(tl.float32), y.to(tl.float32)
        x_square += tl.sum(x_wide * x_wide, 1)
        y_square += tl.sum(y_wide * y_wide, 1)
        if UPCAST:  # the interpreter multiplies bf16 bit patterns as integers
            x, y = x_wide, y_wide
        product = tl.dot(x, tl.trans(y), product, input_precision="ieee")
    cosine = product * factor_of(x_square)[:, None] * factor_of(y_square)[None, :]
    # Where a row next to padding is not finite, too.
    cosine = tl.where(x_valid[:, None] & y_valid[None, :], cosine, 0.0)
    at = plan_ptr + (pair * PLAN_X + i)[:, None] * PLAN_Y + j[None, :]
    tl.store(at, cosine, mask=(i < PLAN_X)[:, None] & (j < PLAN_Y)[None, :])
    if tl.program_id(2) == 0:
        store_factors(x_rows_ptr + pair * X, i, X, x_square, x_valid)
    if tl.program_id(1) == 0:
        store_factors(y_rows_ptr + pair * Y, j, Y, y_square, y_valid)


@triton.jit(do_not_specialize=["iterations", "inner"])
def transport_kernel(
    x_padding_ptr, y_padding_ptr, distance_ptr, plan_ptr, x_rows_ptr, y_rows_ptr,
    X, Y, inverse_beta, iterations, inner, BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr,
):  # fmt: skip
    """Pair program_id(0) from its cosines to its plan, in place; its distance and shares.

    The matrices lie as whole blocks: addresses are constants and take no registers.
    """
    pair, pairs = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    i, j = tl.arange(0, BLOCK_X), tl.arange(0, BLOCK_Y)
    at = plan_ptr + pair * (BLOCK_X * BLOCK_Y) + (i.to(tl.int64)[:, None] * BLOCK_Y + j[None, :])
    valid_x = is_valid(x_padding_ptr + pair * X, i, X)
    valid_y = is_valid(y_padding_ptr + pair * Y, j, Y)
    words, patches = tl.sum(valid_x.to(tl.float32)), tl.sum(valid_y.to(tl.float32))
    # The plan's entries are 2 ** (x_log + y_log - cost * step): one that is too small for float32
    # at some step is back when the logarithms have grown, as a product of steps would not be. At
    # padding they are -inf, and the scalings 0. The plan may start from ones: a common factor
    # cancels in delta.
    x_log, y_log = tl.where(valid_x, 0.0, -float("inf")), tl.where(valid_y, 0.0, -float("inf"))
    sigma = tl.zeros((BLOCK_X,), tl.float32) + 1.0 / tl.maximum(words, 1.0)
    delta = tl.full((BLOCK_Y,), 1.0, tl.float32)
    q = tl.zeros((BLOCK_X, BLOCK_Y), tl.float32)
    for step in range(1, iterations + 1):
        # Read anew each time (volatile, or the compiler would do it once): with this matrix in
        # registers as well, the program would spill.
        strength = step * inverse_beta
        grown = tl.load(at, volatile=True) * strength + y_log[None, :]
        q = tl.exp2(grown + (x_log - strength)[:, None])
        for _ in range(inner):
            delta = balance(tl.sum(q * sigma[:, None], 0), patches)
            sigma = balance(tl.sum(q * delta[None, :], 1), words)
        x_log += tl.log2(sigma)
        y_log += tl.log2(delta)
    q = q * delta[None, :] * sigma[:, None]

    cosine = tl.load(at)
    tl.debug_barrier()  # every thread has read the cosines before a plan takes their place
    tl.store(at, q)
    tl.store(distance_ptr + pair, tl.sum(q * (1.0 - cosine)))
    cosine *= q
    tl.store(x_rows_ptr + (pairs + pair) * X + i, tl.sum(cosine, 1), mask=i < X)
    tl.store(y_rows_ptr + (pairs + pair) * Y + j, tl.sum(cosine, 0), mask=j < Y)


@triton.jit
def gradient_kernel(
    upstream_ptr, own_ptr, other_ptr, plan_ptr, own_rows_ptr, other_rows_ptr, out_ptr,
    OWN, OTHER, D, stride_own_b, stride_own_r, stride_other_b, stride_other_r,
    stride_plan_own, stride_plan_other,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradient of one side: rows program_id(1), columns program_id(2) of pair program_id(0).

    own, other: the features of this side and of the other one. The plan's strides say which of its
    axes is whose.
    """
    pair, pairs = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    plan_at = plan_ptr + pair * OWN * OTHER + row[:, None] * stride_plan_own
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, OTHER, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        plan_inside = (row < OWN)[:, None] & (k < OTHER)[None, :]
        plan = tl.load(plan_at + k[None, :] * stride_plan_other, mask=plan_inside, other=0.0)
        factor = tl.load(other_rows_ptr + pair * OTHER + k, mask=k < OTHER, other=0.0)
        other = load_rows(other_ptr + pair * stride_other_b, k, stride_other_r, col, D, factor != 0)
        unit = other.to(tl.float32) * tl.abs(factor)[:, None]
        sums = tl.dot(plan, unit, sums, input_precision="ieee")
    at = own_rows_ptr + pair * OWN + row
    factor = tl.load(at, mask=row < OWN, other=0.0)
    share = tl.load(at + pairs * OWN, mask=row < OWN, other=0.0)
    share = tl.where(factor < 0, 0.0, share)
    factor = tl.abs(factor)
    own = load_rows(own_ptr + pair * stride_own_b, row, stride_own_r, col, D, factor != 0)
    sums -= own.to(tl.float32) * (factor * share)[:, None]
    scale = tl.where(factor == 0, 0.0, -tl.load(upstream_ptr + pair) * factor)
    gradient = tl.where((factor == 0)[:, None], 0.0, sums * scale[:, None])
    out_at = out_ptr + (pair * OWN + row)[:, None] * D + col[None, :]
    tl.store(out_at, gradient, mask=(row < OWN)[:, None] & (col < D)[None, :])


def _transport_warps(elements: int) -> int:
    return max(4, elements // (32 * THREAD_ELEMENTS))


def _options(launch: Launch) -> dict[str, int | bool]:
    return {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}


def word_patch_alignment(
    x: torch.Tensor,
    y: torch.Tensor,
    x_padding: torch.Tensor,
    y_padding: torch.Tensor,
    *,
    beta: float = 0.5,
    iterations: int = 50,
    inner: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Distances [B], plans [B, Lx, Ly] and results by rows [2, B, Lx], [2, B, Ly], all float32.

    x [B, Lx, D] and y [B, Ly, D], one dtype of float32, bfloat16, float16, unit stride along D;
    contiguous bool masks, True at padding. Raises ValueError on inputs the kernel does not take.
    """
    if reasons := alignment_supported(x, y):
        raise ValueError("the Triton alignment kernels cannot run: " + "; ".join(reasons))
    pairs, words, width = x.shape
    patches = y.shape[1]
    like = {"dtype": torch.float32, "device": x.device}
    distance = torch.empty(pairs, **like)
    x_rows, y_rows = torch.empty(2, pairs, words, **like), torch.empty(2, pairs, patches, **like)
    block_x, block_y = alignment_block(words), alignment_block(patches)
    plan = torch.empty(pairs, block_x, block_y, **like)
    launch = COSINE[x.element_size()]
    grid = (pairs, triton.cdiv(block_x, BLOCK_ROWS), triton.cdiv(block_y, BLOCK_COLS))
    masks = x_padding.view(torch.uint8), y_padding.view(torch.uint8)
    if pairs:
        with on_device(x):
            cosine_kernel[grid](
                x, y, *masks, plan, x_rows, y_rows, words, patches, width,
                x.stride(0), x.stride(1), y.stride(0), y.stride(1),
                PLAN_X=block_x, PLAN_Y=block_y,
                BLOCK_X=BLOCK_ROWS, BLOCK_Y=BLOCK_COLS, BLOCK_K=launch.block_k,
                UPCAST=INTERPRETED and x.dtype is torch.bfloat16, **(_options(launch) | UNFUSED),
            )  # fmt: skip
            transport_kernel[(pairs,)](
                *masks, distance, plan, x_rows, y_rows, words, patches, LOG2E / beta, iterations,
                inner, BLOCK_X=block_x, BLOCK_Y=block_y,
                num_warps=_transport_warps(block_x * block_y), **UNFUSED,
            )  # fmt: skip
    return distance, plan[:, :words, :patches].contiguous(), x_rows, y_rows


def word_patch_alignment_gradients(
    upstream: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    plan: torch.Tensor,
    x_rows: torch.Tensor,
    y_rows: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients w.r.t. x and y in their dtype, from what `word_patch_alignment` returned."""
    strides = plan.stride(1), plan.stride(2)
    dx = _gradient(upstream, x, y, plan, x_rows, y_rows, strides)
    return dx, _gradient(upstream, y, x, plan, y_rows, x_rows, strides[::-1])


def _gradient(upstream, own, other, plan, own_rows, other_rows, strides) -> torch.Tensor:
    pairs, rows, width = own.shape
    # The interpreter truncates where it should round to bf16: there the result is rounded after.
    wide = INTERPRETED and own.dtype is torch.bfloat16
    out = torch.empty(own.shape, dtype=torch.float32 if wide else own.dtype, device=own.device)
    grid = (pairs, triton.cdiv(rows, BLOCK_ROWS), triton.cdiv(width, BLOCK_COLS))
    if out.numel():
        with on_device(own):
            gradient_kernel[grid](
                upstream, own, other, plan, own_rows, other_rows, out, rows, other.shape[1], width,
                own.stride(0), own.stride(1), other.stride(0), other.stride(1), *strides,
                BLOCK_M=BLOCK_ROWS, BLOCK_N=BLOCK_COLS, BLOCK_K=GRADIENT.block_k,
                **_options(GRADIENT),
            )  # fmt: skip
    return out.to(own.dtype)


def aot_cases() -> list[aot.Case]:
    """Every configuration of the three kernels, for ahead-of-time compilation."""
    cases = []
    for capability in CAPABILITIES:
        for kind, size in (("bf16", 2), ("fp16", 2), ("fp32", 4)):
            cases += [
                _cosine_case(capability, kind, COSINE[size]),
                _gradient_case(capability, kind),
            ]
        # The largest blocks, and the smallest.
        for block_x, block_y in ((64, 256), (16, 1024), (16, 16)):
            cases.append(_transport_case(capability, block_x, block_y))
    return cases


def _cosine_case(capability: int, kind: str, launch: Launch) -> aot.Case:
    strides = ("stride_xb", "stride_xr", "stride_yb", "stride_yr")
    return aot.Case(
        name=f"alignment cosine {kind} {BLOCK_ROWS}x{BLOCK_COLS}x{launch.block_k}",
        kernel=cosine_kernel,
        signature={
            **dict.fromkeys(("x_ptr", "y_ptr"), f"*{kind}"),
            **dict.fromkeys(("x_padding_ptr", "y_padding_ptr"), "*u8"),
            **dict.fromkeys(("plan_ptr", "x_rows_ptr", "y_rows_ptr"), "*fp32"),
            **dict.fromkeys(("X", "Y", "D", *strides), "i32"),
        },
        constants={
            "PLAN_X": 64,
            "PLAN_Y": 256,
            "BLOCK_X": BLOCK_ROWS,
            "BLOCK_Y": BLOCK_COLS,
            "BLOCK_K": launch.block_k,
            "UPCAST": False,
        },
        capability=capability,
        warps=launch.warps,
        stages=launch.stages,
        aligned=("D", *strides),
        tensor_cores=kind != "fp32",
        fusion=False,
    )


def _transport_case(capability: int, block_x: int, block_y: int) -> aot.Case:
    pointers = ("distance_ptr", "plan_ptr", "x_rows_ptr", "y_rows_ptr")
    return aot.Case(
        name=f"alignment transport {block_x}x{block_y}",
        kernel=transport_kernel,
        signature={
            **dict.fromkeys(("x_padding_ptr", "y_padding_ptr"), "*u8"),
            **dict.fromkeys(pointers, "*fp32"),
            **dict.fromkeys(("X", "Y", "iterations", "inner"), "i32"),
            "inverse_beta": "fp32",
        },
        constants={"BLOCK_X": block_x, "BLOCK_Y": block_y},
        capability=capability,
        warps=_transport_warps(block_x * block_y),
        stages=3,
        fusion=False,
    )


def _gradient_case(capability: int, kind: str) -> aot.Case:
    strides = [f"stride_{side}_{axis}" for side in ("own", "other") for axis in "br"]
    floats = ("upstream_ptr", "plan_ptr", "own_rows_ptr", "other_rows_ptr")
    return aot.Case(
        name=f"alignment gradient {kind} {BLOCK_ROWS}x{BLOCK_COLS}x{GRADIENT.block_k}",
        kernel=gradient_kernel,
        signature={
            **dict.fromkeys(("own_ptr", "other_ptr", "out_ptr"), f"*{kind}"),
            **dict.fromkeys(floats, "*fp32"),
            **dict.fromkeys(("OWN", "OTHER", "D", *strides), "i32"),
            **dict.fromkeys(("stride_plan_own", "stride_plan_other"), "i32"),
        },
        constants={"BLOCK_M": BLOCK_ROWS, "BLOCK_N": BLOCK_COLS, "BLOCK_K": GRADIENT.block_k},
        capability=capability,
        warps=GRADIENT.warps,
        stages=GRADIENT.stages,
        aligned=("D", *strides),
    )
