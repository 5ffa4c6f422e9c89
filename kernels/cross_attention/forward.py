"""Attention of packed queries to the keys of their segment, forward.

One program for each tile of query rows of a segment and head: it walks the keys in blocks with a
running maximum and sum per row. Where all rows of a segment fit one tile, its keys and values are
read once. Tiles for short queries are as low as 32 rows with two warps, so that 30 query rows fill
them; eight or more such programs share a multiprocessor and keep its memory reads in flight. With
fewer programs than multiprocessors the rows are spread over smaller tiles; the keys of one row are
never split between programs, so that no second pass has to merge them.

Of the softmax of a row the backward pass needs two numbers: the largest product and the logarithm
of the sum of exponentials relative to it. As one log-sum-exp they would lose the second at large
logits, and weights would no longer sum to one. The largest product is subtracted before products
are scaled, which is exact where it matters.

Masked keys and values are not read. A row that attends no key has an output of 0 and statistics of
0 and +inf, which make all its weights 0. The dropout mask is a function of position:
fastvlp/ops/cross_attention/dropout.py defines it.
"""

import torch
import triton
import triton.language as tl

from .._core import aot
from .._core.launch import multiprocessors, on_device
from . import host
from .backward import cross_attention_backward
from .host import INTEGERS, Table, Tile
from .tiles import (
    input_bases,
    keep_tile,
    load_rows,
    own_segment,
    query_base,
    store_rows,
    visible_keys,
)

__all__ = ["cross_attention_backward", "cross_attention_forward"]

TILES: Table = {
    (80, 2, 64): (Tile(32, 64, 2, 3), Tile(64, 32, 4, 3)),
    (80, 2, 80): (Tile(32, 32, 2, 2), Tile(64, 32, 4, 2)),
    (80, 2, 128): (Tile(32, 32, 4, 2), Tile(64, 32, 4, 2), Tile(128, 32, 8, 2)),
    (80, 4, 64): (Tile(32, 32, 8, 1),),
    (80, 4, 128): (Tile(32, 16, 4, 2),),
    (90, 2, 64): (Tile(32, 64, 2, 3), Tile(64, 64, 4, 3)),
    (90, 2, 80): (Tile(32, 32, 2, 2), Tile(64, 64, 4, 2)),
    (90, 2, 128): (Tile(32, 32, 2, 2), Tile(64, 32, 4, 2), Tile(128, 64, 8, 2)),
    (90, 4, 64): (Tile(32, 32, 8, 1),),
    (90, 4, 128): (Tile(32, 32, 8, 2),),
    (100, 2, 64): (Tile(32, 64, 2, 3), Tile(64, 64, 4, 3), Tile(128, 64, 8, 3)),
    (100, 2, 128): (Tile(32, 32, 4, 2), Tile(64, 64, 4, 2), Tile(128, 64, 8, 2)),
    (100, 4, 64): (Tile(32, 32, 8, 1),),
    (100, 4, 128): (Tile(32, 32, 8, 2),),
    (120, 2, 64): (Tile(32, 64, 2, 3), Tile(64, 64, 4, 3), Tile(128, 64, 8, 3)),
    (120, 2, 128): (Tile(32, 32, 4, 2), Tile(64, 32, 4, 2)),
    (120, 4, 64): (Tile(32, 32, 8, 1),),
    (120, 4, 128): (Tile(32, 16, 4, 2),),
}
TILES_INTERPRETED = (Tile(32, 32, 4, 1), Tile(128, 64, 4, 1))


# Rows of a head are a tuple of tiles: [ROWS, WIDTH], and where the next power of two would be far
# beyond the head's width, as for 72 and 80, [ROWS, REST] beside it.
@triton.jit
def load_head(
    base, start, inside, stride, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    REST: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    main = load_rows(base, start, inside, stride, ROWS, D, WIDTH, UPCAST)
    if REST:
        return main, load_rows(base, start, inside, stride, ROWS, D, REST, UPCAST, WIDTH)
    else:
        return (main,)


@triton.jit
def zero_head(ROWS: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr):
    main = tl.zeros((ROWS, WIDTH), tl.float32)
    if REST:
        return main, tl.zeros((ROWS, REST), tl.float32)
    else:
        return (main,)


@triton.jit
def scale_head(x, factor, REST: tl.constexpr):
    """Each row times its factor."""
    if REST:
        return x[0] * factor[:, None], x[1] * factor[:, None]
    else:
        return (x[0] * factor[:, None],)


@triton.jit
def multiply_heads(a, b, REST: tl.constexpr):
    """a b^T, [rows of a, rows of b]."""
    s = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
    if REST:
        s = tl.dot(a[1], tl.trans(b[1]), s, input_precision="ieee")
    return s


@triton.jit
def add_weighted(total, weights, x, REST: tl.constexpr):
    """total + weights x."""
    main = tl.dot(weights, x[0], total[0], input_precision="ieee")
    if REST:
        return main, tl.dot(weights, x[1], total[1], input_precision="ieee")
    else:
        return (main,)


@triton.jit(do_not_specialize=INTEGERS)
def attention_kernel(
    q_ptr, k_ptr, v_ptr, cu_q_ptr, cu_k_ptr, mask_ptr, seed_ptr, out_ptr, statistics_ptr,
    heads, blocks, length, total_q, threshold,
    stride_qt, stride_qh, stride_kn, stride_kt, stride_kh, stride_vn, stride_vt, stride_vh,
    scale, scale_log2, inverse_keep,
    PACKED: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr, CAUSAL: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr, UNIT: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of query rows of one segment and head -> out [total_q, H, D] and the statistics
    [2, H, total_q]."""
    start, head, segment, first_row, rows, first_key, keys = own_segment(
        cu_q_ptr, cu_k_ptr, heads, blocks, length, PACKED, BLOCK_M
    )
    if start >= rows:
        return
    row = start + tl.arange(0, BLOCK_M)
    inside = row < rows
    q_base, k_base, v_base = input_bases(
        q_ptr, k_ptr, v_ptr, segment, head, first_row, first_key,
        stride_qt, stride_qh, stride_kn, stride_kt, stride_kh, stride_vn, stride_vt, stride_vh,
        PACKED, UNIT,
    )  # fmt: skip
    q = load_head(q_base, start, inside, stride_qt * UNIT, BLOCK_M, D, WIDTH, REST, UPCAST)

    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = zero_head(BLOCK_M, WIDTH, REST)
    end = keys
    if CAUSAL:
        end = tl.minimum(keys, start + BLOCK_M + keys - rows)
    for block in range(0, end, BLOCK_N):
        key = block + tl.arange(0, BLOCK_N)
        visible = visible_keys(mask_ptr, first_key, key, keys, MASKED)
        k = load_head(k_base, block, visible, stride_kt * UNIT, BLOCK_N, D, WIDTH, REST, UPCAST)
        s = multiply_heads(q, k, REST)
        attended = visible[None, :]
        if CAUSAL:
            attended = attended & (key[None, :] <= row[:, None] + (keys - rows))
        s = tl.where(attended, s, -float("inf"))
        new = tl.maximum(top, tl.max(s, 1))
        # Rows that have attended nothing yet: -inf - (-inf) would be NaN.
        shift = tl.where(new == -float("inf"), 0.0, new)
        p = tl.exp2((s - shift[:, None]) * scale_log2)
        decay = tl.exp2((top - shift) * scale_log2)
        total = total * decay + tl.sum(p, 1)
        acc = scale_head(acc, decay, REST)
        if DROPOUT:
            keep = keep_tile(
                tl.load(seed_ptr), first_row + start, block, head, threshold, BLOCK_M, BLOCK_N
            )
            p = tl.where(keep, p, 0.0)
        v = load_head(v_base, block, visible, stride_vt * UNIT, BLOCK_N, D, WIDTH, REST, UPCAST)
        acc = add_weighted(acc, p.to(v[0].dtype), v, REST)
        top = new

    out = scale_head(acc, inverse_keep / tl.where(total == 0, 1.0, total), REST)
    out_base = query_base(out_ptr, first_row, head, heads * D, D, 1)
    store_rows(out_base, start, inside, heads * D, out[0], BLOCK_M, D, WIDTH)
    if REST:
        store_rows(out_base, start, inside, heads * D, out[1], BLOCK_M, D, REST, WIDTH)
    at = head.to(tl.int64) * total_q + first_row + row
    tl.store(statistics_ptr + at, tl.where(total == 0, 0.0, top), mask=inside)
    log_total = tl.where(total == 0, float("inf"), tl.log2(total))
    tl.store(statistics_ptr + heads.to(tl.int64) * total_q + at, log_total, mask=inside)


def choose_tile(tiles: tuple[Tile, ...], sizes: host.Sizes, multiprocessors: int) -> Tile:
    """The lowest tile that holds a segment's rows, lower still to employ every multiprocessor."""
    best = tiles[0]
    for tile in tiles[1:]:
        blocks = -(-sizes.max_q // tile.rows)
        if best.rows >= sizes.max_q or sizes.programs(blocks) < multiprocessors:
            break
        best = tile
    return best


def cross_attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    seed: torch.Tensor,
    *,
    scale: float,
    dropout_p: float,
    causal: bool,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output [total_q, H, d] in q's dtype and, for the backward pass, the float32 statistics
    [2, H, total_q] of the softmax.

    q [total_q, H, d]; k, v [n, L, H, d], or [total_k, H, d] with cu_seqlens_k; one dtype of
    float32, bfloat16, float16, d at most 128 with unit stride, any other strides. cu_seqlens
    [n + 1], int32 or int64; key_mask bool [n, L] or [total_k], True = attend, or None; seed an
    int64 tensor of one element; all on one device. max_seqlen_q and max_seqlen_k bound the rows and
    keys of every segment from above. Raises ValueError on inputs the kernels do not take.
    """
    if scale < 0:  # the largest product must be the largest logit
        q = -q
    inputs = (q, k, v, cu_seqlens_q, cu_seqlens_k, key_mask)
    sizes = host.check(*inputs, max_seqlen_q, max_seqlen_k)
    out = host.empty_result(q)
    statistics = torch.empty(2, q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
    tiles = host.tiles_of(TILES, TILES_INTERPRETED, q)
    tile = choose_tile(tiles, sizes, multiprocessors(q.device))
    if q.numel():
        shared = host.shared_arguments(
            sizes, *inputs, seed, abs(scale), dropout_p, causal, split=True
        )
        blocks = -(-max_seqlen_q // tile.rows)
        with on_device(q):
            own = {"out_ptr": out, "statistics_ptr": statistics}
            host.launch_tile(attention_kernel, tile, blocks, shared, own)
    return host.rounded(out, q), statistics


def aot_cases() -> list[aot.Case]:
    """Every configuration of the kernel above, for ahead-of-time compilation."""
    own = {"out_ptr": "*T", "statistics_ptr": "*fp32"}
    return host.tile_cases(attention_kernel, TILES, own)
