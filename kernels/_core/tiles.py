"""Device code shared by the kernels that walk a matrix of logits z = scale * X @ Y.T in tiles."""

import triton
import triton.language as tl

from .support import ALIGNMENT

LOG2E = tl.constexpr(1.4426950408889634)
_ALIGNMENT = tl.constexpr(ALIGNMENT)


@triton.jit
def exp_difference(a, b):
    """exp(a - b), with the subtraction before the change of base.

    Folding log2(e) into the scale would save a multiplication but round a and b apart first,
    which at logits of 1e4 costs a factor of exp(1e-3).
    """
    return tl.exp2((a - b) * LOG2E)


@triton.jit
def tile_position(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """(row block, column block) of this program.

    GROUP row blocks are walked column by column, so that concurrent programs share their rows
    of X and of Y in the L2 cache.
    """
    blocks_m = tl.cdiv(M, BLOCK_M)
    per_group = GROUP * tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    first = program // per_group * GROUP
    height = tl.minimum(blocks_m - first, GROUP)
    inside = program % per_group
    return first + inside % height, inside // height


@triton.jit
def own_tile(
    M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """(row block, column block, rows [BLOCK_M], columns [BLOCK_N]) of this program."""
    block_m, block_n = tile_position(M, N, BLOCK_M, BLOCK_N, GROUP)
    row = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    col = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    return block_m, block_n, row, col


@triton.jit
def dot_tile(
    x_ptr, y_ptr, row, col, M, N, D, stride_x, stride_y,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """X[row] @ Y[col].T in fp32, [BLOCK_M, BLOCK_N].

    Rows past the end repeat the last one instead of being masked: the loads stay unpredicated
    and the caller discards those lanes. UPCAST widens the operands first (the interpreter
    multiplies bf16 bit patterns as integers).
    """
    depth = tl.arange(0, BLOCK_K)
    x_at = x_ptr + tl.minimum(row, M - 1).to(tl.int64)[:, None] * stride_x + depth[None, :]
    y_at = y_ptr + tl.minimum(col, N - 1).to(tl.int64)[:, None] * stride_y + depth[None, :]
    z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_at + start)
            y = tl.load(y_at + start)
        else:
            inside = (start + depth < D)[None, :]
            x = tl.load(x_at + start, mask=inside, other=0.0)
            y = tl.load(y_at + start, mask=inside, other=0.0)
        if UPCAST:
            x = x.to(tl.float32)
            y = y.to(tl.float32)
        z = tl.dot(x, tl.trans(y), z, input_precision=PRECISION)
    return z


@triton.jit
def store_gradients(g_ptr, g, row, col, M, N, stride_g):
    """g -> [M, N], rows `stride_g` apart, a multiple of ALIGNMENT of at least N.

    It writes between a row's end and that multiple too: a mask that ended at N, which may lie
    anywhere, would have every element stored by itself.
    """
    at = row.to(tl.int64)[:, None] * stride_g + col[None, :]
    held = (row < M)[:, None] & (col < tl.cdiv(N, _ALIGNMENT) * _ALIGNMENT)[None, :]
    tl.store(g_ptr + at, g.to(g_ptr.dtype.element_ty), mask=held)


@triton.jit
def column_halves(z):
    """The left and the right half of z [M, N], each [M, N / 2]."""
    M: tl.constexpr = z.shape[0]
    N: tl.constexpr = z.shape[1]
    return tl.split(tl.permute(tl.reshape(z, (M, 2, N // 2)), (0, 2, 1)))


@triton.jit
def has_pairs(row, col, first_col, offset):
    """Whether the pairs (row, row + offset) of consecutive rows reach columns from first_col on."""
    partner = tl.min(row, 0) + offset
    return (partner < first_col + col.shape[0]) & (partner + row.shape[0] > first_col)


@triton.jit
def row_products(a, b, first_col, col, N):
    """Each row's sum of a * b over the columns before N, `col` from first_col on.

    The branch also keeps the products apart from the sum: fused into the first exchange between
    lanes, a product would be rounded by one of two lanes only.
    """
    products = a * b
    if first_col + col.shape[0] > N:
        products = tl.where((col < N)[None, :], products, 0.0)
    return tl.sum(products, 1)
