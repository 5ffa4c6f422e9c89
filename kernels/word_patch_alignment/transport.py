"""Word-patch alignment (ViLT's optimal-transport distance): one program solves one pair.

The cosines of all pairs come from tiles of GEMMs; half-precision features go through tensor
cores and are normalised afterwards, which is exact to fp32 rounding: the products themselves are.
Then a program takes a pair through all its iterations with Q and exp(-C / beta) in registers.

The plan, [words, patches], and what the gradients need of each row leave the kernels: the factor
that normalises it (0 at padding, negative where only the smallest norm divides it) and its share,
the sum of plan times cosine.
"""

import torch
import triton
import triton.language as tl

from .._core import aot
from .._core.launch import (
    CAPABILITIES,
    INTERPRETED,
    UNFUSED,
    Tile,
    ceil_div,
    launch,
    launch_options,
    on_device,
)
from .._core.support import alignment_block, alignment_supported

LOG2E = 1.4426950408889634
SMALLEST_NORM = tl.constexpr(1e-5)


# Tiles by bytes of a feature. Half precision is not pipelined: Triton's pipeline for sm_90
# overwrites a tile that registers are loaded from while wgmma may still read it.
COSINE = {2: Tile(64, 64, 128, 1, 8, 1), 4: Tile(64, 32, 32, 1, 4, 2)}
# Steps between two exponentials of a plan's logarithms. Entries that float32 loses are below
# 2 ** -126 then, and below 2 ** -46 of the plan after steps whose scalings grow to no more than
# LARGEST; where they grow further, the steps are taken again, half as many at a time.
MOST_STEPS = tl.constexpr(13)
LARGEST = tl.constexpr(2.0**40)


@triton.jit
def load_rows(ptr, row, stride, depth, D, valid):
    """Elements [row, depth], 0 past the width and in rows that are not valid."""
    at = ptr + row.to(tl.int64)[:, None] * stride + depth[None, :]
    return tl.load(at, mask=valid[:, None] & (depth < D)[None, :], other=0.0)


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
    x_ptr, y_ptr, x_padding_ptr, y_padding_ptr, cosine_ptr, x_rows_ptr, y_rows_ptr,
    X, Y, D, stride_xb, stride_xr, stride_yb, stride_yr,
    HEIGHT: tl.constexpr, LENGTH: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Cosines of pair program_id(0), [HEIGHT, LENGTH] and 0 at padding; factors of its rows."""
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
    at = cosine_ptr + (pair * HEIGHT + i)[:, None] * LENGTH + j[None, :]
    tl.store(at, cosine, mask=(i < HEIGHT)[:, None] & (j < LENGTH)[None, :])
    if tl.program_id(2) == 0:
        store_factors(x_rows_ptr + pair * X, i, X, x_square, x_valid)
    if tl.program_id(1) == 0:
        store_factors(y_rows_ptr + pair * Y, j, Y, y_square, y_valid)


@triton.jit
def fold(x):
    """The largest of every eighth element, [8]: of those that one thread holds, at little cost."""
    return tl.max(tl.reshape(x, (x.shape[0] // 8, 8)), 0)


@triton.jit
def scaling(total, logarithm):
    """1 / total, and 0 where the logarithm says that there is nothing; infinity for a lost sum."""
    return tl.where(logarithm == -float("inf"), 0.0, 1.0 / total)


@triton.jit
def sum_patches(q, BITS: tl.constexpr):
    """[C, X, W] -> [X]. Parts of a row first, which one thread holds; then pair by pair, all rows
    at once, where a sum over a whole row would wait for one exchange after another."""
    sums = tl.sum(q, 0)
    for _ in tl.static_range(BITS):
        sums = tl.sum(tl.reshape(sums, (sums.shape[0], sums.shape[1] // 2, 2)), 2)
    return tl.reshape(sums, (sums.shape[0],))


@triton.jit(do_not_specialize=["iterations", "inner"])
def transport_kernel(
    x_padding_ptr, y_padding_ptr, distance_ptr, plan_ptr, x_rows_ptr, y_rows_ptr,
    X, Y, inverse_beta, iterations, inner,
    BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, WIDTH: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Pair program_id(0) from its cosines to its plan, in place; its distance and shares.

    A row of a matrix is cut into BLOCK_Y // WIDTH parts, [C, X, W], so that few threads share a row
    and few a column. The matrices lie as whole blocks: addresses are constants. KEEP: whether
    exp(-C / beta) stays in registers; where they are too few it is computed for every step.
    """
    BITS: tl.constexpr = tl.constexpr(WIDTH.bit_length() - 1)
    pair, pairs = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    i = tl.arange(0, BLOCK_X)
    j = tl.arange(0, BLOCK_Y // WIDTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    # As [C X, W] in memory's eyes, or Triton 3.6 gives a row's parts to several warps.
    PARTS: tl.constexpr = BLOCK_Y // WIDTH
    line = tl.arange(0, PARTS * BLOCK_X)
    at = (line % BLOCK_X) * BLOCK_Y + line // BLOCK_X * WIDTH
    at = plan_ptr + pair * (BLOCK_X * BLOCK_Y) + at[:, None] + tl.arange(0, WIDTH)[None, :]
    valid_x = is_valid(x_padding_ptr + pair * X, i, X)
    valid_y = is_valid(y_padding_ptr + pair * Y, j, Y)
    words, patches = tl.sum(valid_x.to(tl.float32)), tl.sum(valid_y.to(tl.float32))
    # The plan's entries after a step are 2 ** (x_log + y_log - cost * step): one that is too small
    # for float32 at some step is back when the logarithms have grown. The plan may start from ones,
    # so may the scalings, and costs from the least of them: a common factor cancels. At padding
    # the logarithms are -inf, and so are all of a pair that has nothing on the other side.
    x_log = tl.where(valid_x, tl.where(patches == 0, -float("inf"), 0.0), -float("inf"))
    y_log = tl.where(valid_y, tl.where(words == 0, -float("inf"), 0.0), -float("inf"))
    sigma = tl.where(valid_x, 1.0, 0.0)
    x, y = tl.zeros_like(x_log), tl.zeros_like(y_log)
    q = tl.zeros((BLOCK_Y // WIDTH, BLOCK_X, WIDTH), tl.float32)
    cosine = tl.reshape(tl.load(at), q.shape)
    nearest = tl.max(cosine)
    gibbs = tl.exp2((cosine - nearest) * inverse_beta)
    done, most = 0, MOST_STEPS
    while done < iterations:
        # Read anew each time (volatile, or the compiler would do it once): with this matrix in
        # registers as well, the program would spill.
        strength = done * inverse_beta
        grown = tl.reshape(tl.load(at, volatile=True), q.shape) * strength + y_log[:, None, :]
        q = tl.exp2(grown + (x_log - nearest * strength)[None, :, None])
        # From here on the plan is q * x * y, and q the plan before times gibbs ** steps.
        steps = tl.minimum(most, iterations - done)
        weight, inverse, growth = sigma, tl.full((BLOCK_X,), 1.0, tl.float32), sigma
        x_high, y_high = fold(sigma), tl.zeros((WIDTH,), tl.float32)
        for _ in range(steps):
            if not KEEP:
                cosine = tl.reshape(tl.load(at, volatile=True), q.shape)
                gibbs = tl.exp2((cosine - nearest) * inverse_beta)
            q *= gibbs
            before = inverse
            for _ in range(inner):
                y = scaling(tl.sum(q * weight[None, :, None], 1) * patches, y_log)
                inverse = sum_patches(q * y[:, None, :], BITS) * words
                x = scaling(inverse, x_log)
                weight = x
            growth = x * before
            weight = x * growth
            # Of x, too: it is the root of its weight times the x of before.
            x_high = tl.maximum(x_high, fold(weight))
            y_high = tl.maximum(y_high, tl.max(y, 0))
        if (steps == 1) | ((tl.max(x_high) <= LARGEST) & (tl.max(y_high) <= LARGEST)):
            x_log += tl.log2(x)
            y_log += tl.log2(y)
            sigma = growth
            done += steps
        else:
            most = steps // 2
    q = q * y[:, None, :] * x[None, :, None]

    cosine = tl.reshape(tl.load(at, volatile=True), q.shape)
    tl.debug_barrier()  # every thread has read the cosines before a plan takes their place
    tl.store(at, tl.reshape(q, at.shape))
    tl.store(distance_ptr + pair, tl.sum(q * (1.0 - cosine)))
    cosine *= q
    tl.store(x_rows_ptr + (pairs + pair) * X + i, sum_patches(cosine, BITS), mask=i < X)
    tl.store(y_rows_ptr + (pairs + pair) * Y + j, tl.sum(cosine, 1), mask=j < Y)


def _transport_options(block_x: int, block_y: int) -> dict[str, int | bool]:
    # From 1,024 elements on a thread has two at least in every direction: a sum begins with them,
    # and no product is fused into an exchange between lanes.
    elements = block_x * block_y
    return {"num_warps": max(1, elements // 2048), "enable_fp_fusion": elements >= 1024}


def _transport_constants(block_x: int, block_y: int) -> dict[str, int | bool]:
    # The vectors of a row of 1,024 take the room of a matrix.
    width, keep = min(block_y, 128), block_y < 1024
    return {"BLOCK_X": block_x, "BLOCK_Y": block_y, "WIDTH": width, "KEEP": keep}


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
    tile = COSINE[x.element_size()]
    grid = (pairs, ceil_div(block_x, tile.block_m), ceil_div(block_y, tile.block_n))
    masks = {"x_padding_ptr": x_padding.view(torch.uint8)}
    masks["y_padding_ptr"] = y_padding.view(torch.uint8)
    rows = {"x_rows_ptr": x_rows, "y_rows_ptr": y_rows}
    if pairs:
        with on_device(x):
            launch(
                cosine_kernel, grid, {"x_ptr": x, "y_ptr": y} | masks | {"cosine_ptr": plan} | rows,
                {"X": words, "Y": patches, "D": width, "stride_xb": x.stride(0),
                 "stride_xr": x.stride(1), "stride_yb": y.stride(0), "stride_yr": y.stride(1)},
                {"HEIGHT": block_x, "LENGTH": block_y,
                 "BLOCK_X": tile.block_m, "BLOCK_Y": tile.block_n, "BLOCK_K": tile.block_k,
                 "UPCAST": INTERPRETED and x.dtype is torch.bfloat16},
                launch_options(tile) | UNFUSED,
            )  # fmt: skip
            launch(
                transport_kernel, pairs,
                masks | {"distance_ptr": distance, "plan_ptr": plan} | rows,
                {"X": words, "Y": patches, "inverse_beta": LOG2E / beta, "iterations": iterations,
                 "inner": inner},
                _transport_constants(block_x, block_y), _transport_options(block_x, block_y),
            )  # fmt: skip
    return distance, plan[:, :words, :patches].contiguous(), x_rows, y_rows


def aot_cases() -> list[aot.Case]:
    """Every configuration of both kernels, for ahead-of-time compilation."""
    cases = []
    for capability in CAPABILITIES:
        for kind, size in (("bf16", 2), ("fp16", 2), ("fp32", 4)):
            cases.append(_cosine_case(capability, kind, COSINE[size]))
        # The largest blocks, and the smallest.
        for block_x, block_y in ((64, 256), (16, 1024), (16, 16)):
            cases.append(_transport_case(capability, block_x, block_y))
    return cases


def _cosine_case(capability: int, kind: str, tile: Tile) -> aot.Case:
    strides = ("stride_xb", "stride_xr", "stride_yb", "stride_yr")
    return aot.Case(
        name=f"alignment cosine {kind} {tile.block_m}x{tile.block_n}x{tile.block_k}",
        kernel=cosine_kernel,
        signature={
            **dict.fromkeys(("x_ptr", "y_ptr"), f"*{kind}"),
            **dict.fromkeys(("x_padding_ptr", "y_padding_ptr"), "*u8"),
            **dict.fromkeys(("cosine_ptr", "x_rows_ptr", "y_rows_ptr"), "*fp32"),
            **dict.fromkeys(("X", "Y", "D", *strides), "i32"),
        },
        constants={
            "HEIGHT": 64,
            "LENGTH": 256,
            "BLOCK_X": tile.block_m,
            "BLOCK_Y": tile.block_n,
            "BLOCK_K": tile.block_k,
            "UPCAST": False,
        },
        capability=capability,
        warps=tile.warps,
        stages=tile.stages,
        aligned=("D", *strides),
        tensor_cores=kind != "fp32",
        fusion=False,
    )


def _transport_case(capability: int, block_x: int, block_y: int) -> aot.Case:
    options = _transport_options(block_x, block_y)
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
        constants=_transport_constants(block_x, block_y),
        capability=capability,
        warps=options["num_warps"],
        stages=3,
        fusion=options["enable_fp_fusion"],
    )
