"""Kernels of textbook form whose times on GPUs are public: matmul, softmax, attention.

They have the tiles of the kernels of Triton's tutorials, and were written for this comparison: the
model has to rank their sizes and variants as the published times do.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def matmul_kernel(
    a_ptr, b_ptr, c_ptr, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """C [M, N] = A [M, K] B [K, N], contiguous; programs in groups of GROUP rows of tiles."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    number = tl.program_id(0)
    group = number // (GROUP * tiles_n)
    height = min(tiles_m - group * GROUP, GROUP)
    row = group * GROUP + number % (GROUP * tiles_n) % height
    column = number % (GROUP * tiles_n) // height
    m = (row * BLOCK_M + tl.arange(0, BLOCK_M)) % M
    n = (column * BLOCK_N + tl.arange(0, BLOCK_N)) % N
    k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + m[:, None] * K + k[None, :]
    b_ptrs = b_ptr + k[:, None] * N + n[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, tl.cdiv(K, BLOCK_K)):
        left = K - step * BLOCK_K
        a = tl.load(a_ptrs, mask=k[None, :] < left, other=0.0)
        b = tl.load(b_ptrs, mask=k[:, None] < left, other=0.0)
        total = tl.dot(a, b, total)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K * N
    m = row * BLOCK_M + tl.arange(0, BLOCK_M)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (m[:, None] < M) & (n[None, :] < N)
    tl.store(c_ptr + m[:, None] * N + n[None, :], total.to(tl.float16), mask=inside)


# Tiles among which the tutorial's autotuner chooses: rows, columns, depth, warps, stages.
MATMUL_TILES = ((128, 256, 64, 8, 3), (128, 128, 32, 4, 4), (64, 128, 32, 4, 4), (64, 64, 32, 2, 5))


def matmul(a: torch.Tensor, b: torch.Tensor, tile: tuple[int, ...]) -> torch.Tensor:
    rows, columns, depth, warps, stages = tile
    (m, k), n = a.shape, b.shape[1]
    c = torch.empty(m, n, dtype=torch.float16)
    matmul_kernel[(triton.cdiv(m, rows) * triton.cdiv(n, columns),)](
        a, b, c, m, n, k, BLOCK_M=rows, BLOCK_N=columns, BLOCK_K=depth, GROUP=8,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return c


@triton.jit
def softmax_kernel(x_ptr, out_ptr, rows, columns, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """Each program takes every n-th of the rows, of which one fits its registers."""
    column = tl.arange(0, BLOCK)
    inside = column < columns
    for row in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=STAGES):
        x = tl.load(x_ptr + row * columns + column, mask=inside, other=-float("inf"))
        e = tl.exp(x - tl.max(x, 0))
        tl.store(out_ptr + row * columns + column, e / tl.sum(e, 0), mask=inside)


def softmax(x: torch.Tensor, programs: int) -> torch.Tensor:
    rows, columns = x.shape
    out = torch.empty_like(x)
    softmax_kernel[(min(programs, rows),)](
        x, out, rows, columns, BLOCK=triton.next_power_of_2(columns), STAGES=4, num_warps=8
    )
    return out


@triton.jit
def attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, scale, L,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """out = softmax(scale Q K') V by online softmax; q, k, v, out [B x H, L, D] in fp16.

    Where causal, tiles left of the diagonal need no mask and have a loop of their own.
    """
    start = tl.program_id(0) * BLOCK_M
    base = tl.program_id(1).to(tl.int64) * L * D
    m, n, d = start + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, D)
    q = tl.load(q_ptr + base + m[:, None] * D + d[None, :])
    factor = scale * 1.44269504
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    out = tl.zeros((BLOCK_M, D), tl.float32)
    last = start if CAUSAL else L
    for first in range(0, last, BLOCK_N):
        out, top, total = _attend(
            q, k_ptr + base, v_ptr + base, first + n, m, d, factor, out, top, total, D, False
        )
    if CAUSAL:
        for first in range(start, start + BLOCK_M, BLOCK_N):
            out, top, total = _attend(
                q, k_ptr + base, v_ptr + base, first + n, m, d, factor, out, top, total, D, True
            )
    out = out / total[:, None]
    tl.store(out_ptr + base + m[:, None] * D + d[None, :], out.to(tl.float16))


@triton.jit
def _attend(q, k_ptr, v_ptr, n, m, d, factor, out, top, total, D: tl.constexpr, MASK: tl.constexpr):
    k = tl.load(k_ptr + n[None, :] * D + d[:, None])
    z = tl.dot(q, k) * factor
    if MASK:
        z = tl.where(m[:, None] >= n[None, :], z, -float("inf"))
    higher = tl.maximum(top, tl.max(z, 1))
    p = tl.math.exp2(z - higher[:, None])
    shrink = tl.math.exp2(top - higher)
    total = total * shrink + tl.sum(p, 1)
    v = tl.load(v_ptr + n[:, None] * D + d[None, :])
    out = tl.dot(p.to(tl.float16), v, out * shrink[:, None])
    return out, higher, total


# Rows, columns, warps, stages among which the tutorial's autotuner chooses.
ATTENTION_TILES = ((128, 64, 8, 3), (128, 64, 4, 3), (128, 32, 4, 3), (64, 64, 4, 3))


def attention(q, k, v, causal: bool, tile: tuple[int, ...]) -> torch.Tensor:
    rows, columns, warps, stages = tile
    heads, length, width = q.shape
    out = torch.empty_like(q)
    attention_kernel[(length // rows, heads)](
        q, k, v, out, width**-0.5, length, D=width, BLOCK_M=rows, BLOCK_N=columns, CAUSAL=causal,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out
