"""Gradients of attention of packed queries to the keys of their segment.

With P the softmax, K the dropout factors (0 or 1 / (1 - p)), delta = rowsum(dO * O):

    dV = (P K)^T dO,   dS = P (K (dO V^T) - delta),   dQ = scale dS k,   dK = scale dS^T q

P comes again from the products and the statistics of the forward pass. Every element of a gradient
is summed by one program in a fixed order: no atomics, the same bits on every run.

Short queries, up to 128 rows in a segment: one program per segment and head walks the keys once,
writes their dK and dV and keeps dQ: five GEMMs. Longer queries, or too few segments and heads to
employ every multiprocessor: a kernel over tiles of queries makes dQ and delta, one over blocks of
keys dK and dV: seven GEMMs, but programs in plenty.
"""

import torch
import triton
import triton.language as tl

from .._core import aot
from .._core.launch import multiprocessors, on_device
from . import host
from .backward_tiles import FUSED_TILES, KEY_TILES, QUERY_TILES
from .gradients import (
    add_to_keys,
    add_to_queries,
    add_to_values,
    load_queries,
    load_statistics,
    logit_gradient,
    weights_tile,
    zeros_of,
)
from .host import INTEGERS, Tile
from .tiles import (
    input_bases,
    load_rows,
    own_segment,
    query_base,
    store_rows,
    visible_keys,
)

FUSED_INTERPRETED = (Tile(32, 32, 4, 1), Tile(128, 64, 4, 1, halves=2, keys_first=False))
QUERY_INTERPRETED = (Tile(32, 64, 4, 1, keys_first=False),)
KEY_INTERPRETED = (Tile(32, 64, 4, 1),)


@triton.jit
def store_keys(
    base, block, exists, used, stride, x, factor, BLOCK_N: tl.constexpr, D: tl.constexpr,
    WIDTH: tl.constexpr, KEYS_FIRST: tl.constexpr,
):  # fmt: skip
    """Store a block of dK or dV with the factor that it lacks; 0 for keys that are not used."""
    x = x * factor
    if not KEYS_FIRST:
        x = tl.trans(x)
    x = tl.where(used[:, None], x, 0.0)
    store_rows(base, block, exists, stride, x, BLOCK_N, D, WIDTH)


@triton.jit
def store_queries(
    base, start, row, rows, stride, dq, scale, BLOCK_M: tl.constexpr, D: tl.constexpr,
    WIDTH: tl.constexpr, KEYS_FIRST: tl.constexpr,
):  # fmt: skip
    """Store a tile of dQ with the factor that it lacks."""
    dq = dq * scale
    if KEYS_FIRST:
        dq = tl.trans(dq)
    store_rows(base, start, row < rows, stride, dq, BLOCK_M, D, WIDTH)


@triton.jit(do_not_specialize=INTEGERS)
def fused_gradient_kernel(
    q_ptr, k_ptr, v_ptr, cu_q_ptr, cu_k_ptr, mask_ptr, seed_ptr,
    do_ptr, out_ptr, statistics_ptr, dq_ptr, dk_ptr, dv_ptr,
    heads, blocks, length, total_q, threshold,
    stride_qt, stride_qh, stride_kn, stride_kt, stride_kh, stride_vn, stride_vt, stride_vh,
    scale, scale_log2, inverse_keep,
    PACKED: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr, CAUSAL: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr,
    UPCAST: tl.constexpr, KEYS_FIRST: tl.constexpr, HALVES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dQ, dK and dV of one segment and head, whose rows are in one tile of BLOCK_M or HALVES 2."""
    _, head, segment, first_row, rows, first_key, keys = own_segment(
        cu_q_ptr, cu_k_ptr, heads, blocks, length, PACKED, BLOCK_M
    )
    q_base, k_base, v_base = input_bases(
        q_ptr, k_ptr, v_ptr, segment, head, first_row, first_key,
        stride_qt, stride_qh, stride_kn, stride_kt, stride_kh, stride_vn, stride_vt, stride_vh,
        PACKED, UNIT,
    )  # fmt: skip
    do_base = query_base(do_ptr, first_row, head, heads * D, D, 1)
    out_base = query_base(out_ptr, first_row, head, heads * D, D, 1)
    dk_base = query_base(dk_ptr, first_key, head, heads * D, D, 1)
    dv_base = query_base(dv_ptr, first_key, head, heads * D, D, 1)
    q, do, delta, top, log_total, row = load_queries(
        q_base, do_base, out_base, statistics_ptr, 0, rows, first_row, head, heads, total_q,
        stride_qt * UNIT, BLOCK_M, D, WIDTH, UPCAST,
    )  # fmt: skip
    dq = zeros_of(BLOCK_M, WIDTH, KEYS_FIRST)
    if HALVES == 2:
        q2, do2, delta2, top2, log_total2, row2 = load_queries(
            q_base, do_base, out_base, statistics_ptr, BLOCK_M, rows, first_row, head, heads,
            total_q, stride_qt * UNIT, BLOCK_M, D, WIDTH, UPCAST,
        )  # fmt: skip
        dq2 = zeros_of(BLOCK_M, WIDTH, KEYS_FIRST)
    for block in range(0, keys, BLOCK_N):
        key = block + tl.arange(0, BLOCK_N)
        visible = visible_keys(mask_ptr, first_key, key, keys, MASKED)
        k = load_rows(k_base, block, visible, stride_kt * UNIT, BLOCK_N, D, WIDTH, UPCAST)
        v = load_rows(v_base, block, visible, stride_vt * UNIT, BLOCK_N, D, WIDTH, UPCAST)
        zeros = zeros_of(BLOCK_N, WIDTH, not KEYS_FIRST)
        # A selection for masked keys: a NaN in a query must not reach them either.
        used, exists = visible & (rows > 0), key < keys
        p = weights_tile(
            q, k, top, log_total, row, key, visible, keys - rows, first_row, block, head,
            seed_ptr, threshold, scale_log2, DROPOUT, CAUSAL, KEYS_FIRST, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        dv = add_to_values(zeros, p, do, DROPOUT, KEYS_FIRST)
        if HALVES == 1:
            store_keys(
                dv_base, block, exists, used, heads * D, dv, inverse_keep,
                BLOCK_N, D, WIDTH, KEYS_FIRST,
            )  # fmt: skip
        ds = logit_gradient(p, v, do, delta, inverse_keep, DROPOUT, KEYS_FIRST)
        dk = add_to_keys(zeros, ds, q, KEYS_FIRST)
        if HALVES == 1:
            store_keys(
                dk_base, block, exists, used, heads * D, dk, scale,
                BLOCK_N, D, WIDTH, KEYS_FIRST,
            )  # fmt: skip
        dq = add_to_queries(dq, ds, k, KEYS_FIRST)
        if HALVES == 2:
            p = weights_tile(
                q2, k, top2, log_total2, row2, key, visible, keys - rows, first_row + BLOCK_M,
                block, head, seed_ptr, threshold, scale_log2,
                DROPOUT, CAUSAL, KEYS_FIRST, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            dv = add_to_values(dv, p, do2, DROPOUT, KEYS_FIRST)
            store_keys(
                dv_base, block, exists, used, heads * D, dv, inverse_keep,
                BLOCK_N, D, WIDTH, KEYS_FIRST,
            )  # fmt: skip
            ds = logit_gradient(p, v, do2, delta2, inverse_keep, DROPOUT, KEYS_FIRST)
            dk = add_to_keys(dk, ds, q2, KEYS_FIRST)
            store_keys(
                dk_base, block, exists, used, heads * D, dk, scale,
                BLOCK_N, D, WIDTH, KEYS_FIRST,
            )  # fmt: skip
            dq2 = add_to_queries(dq2, ds, k, KEYS_FIRST)
    dq_base = query_base(dq_ptr, first_row, head, heads * D, D, 1)
    store_queries(dq_base, 0, row, rows, heads * D, dq, scale, BLOCK_M, D, WIDTH, KEYS_FIRST)
    if HALVES == 2:
        store_queries(
            dq_base, BLOCK_M, row2, rows, heads * D, dq2, scale, BLOCK_M, D, WIDTH, KEYS_FIRST
        )


@triton.jit(do_not_specialize=INTEGERS)
def query_gradient_kernel(
    q_ptr, k_ptr, v_ptr, cu_q_ptr, cu_k_ptr, mask_ptr, seed_ptr,
    do_ptr, out_ptr, statistics_ptr, delta_ptr, dq_ptr,
    heads, blocks, length, total_q, threshold,
    stride_qt, stride_qh, stride_kn, stride_kt, stride_kh, stride_vn, stride_vt, stride_vh,
    scale, scale_log2, inverse_keep,
    PACKED: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr, CAUSAL: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr,
    UPCAST: tl.constexpr, KEYS_FIRST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of query rows of one segment and head, and delta for the other kernel."""
    start, head, segment, first_row, rows, first_key, keys = own_segment(
        cu_q_ptr, cu_k_ptr, heads, blocks, length, PACKED, BLOCK_M
    )
    if start >= rows:
        return
    q_base, k_base, v_base = input_bases(
        q_ptr, k_ptr, v_ptr, segment, head, first_row, first_key,
        stride_qt, stride_qh, stride_kn, stride_kt, stride_kh, stride_vn, stride_vt, stride_vh,
        PACKED, UNIT,
    )  # fmt: skip
    do_base = query_base(do_ptr, first_row, head, heads * D, D, 1)
    out_base = query_base(out_ptr, first_row, head, heads * D, D, 1)
    q, do, delta, top, log_total, row = load_queries(
        q_base, do_base, out_base, statistics_ptr, start, rows, first_row, head, heads, total_q,
        stride_qt * UNIT, BLOCK_M, D, WIDTH, UPCAST,
    )  # fmt: skip
    at = head.to(tl.int64) * total_q + first_row + row
    tl.store(delta_ptr + at, delta, mask=row < rows)

    dq = zeros_of(BLOCK_M, WIDTH, KEYS_FIRST)
    end = keys
    if CAUSAL:
        end = tl.minimum(keys, start + BLOCK_M + keys - rows)
    for block in range(0, end, BLOCK_N):
        key = block + tl.arange(0, BLOCK_N)
        visible = visible_keys(mask_ptr, first_key, key, keys, MASKED)
        k = load_rows(k_base, block, visible, stride_kt * UNIT, BLOCK_N, D, WIDTH, UPCAST)
        v = load_rows(v_base, block, visible, stride_vt * UNIT, BLOCK_N, D, WIDTH, UPCAST)
        p = weights_tile(
            q, k, top, log_total, row, key, visible, keys - rows, first_row + start, block, head,
            seed_ptr, threshold, scale_log2, DROPOUT, CAUSAL, KEYS_FIRST, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        ds = logit_gradient(p, v, do, delta, inverse_keep, DROPOUT, KEYS_FIRST)
        dq = add_to_queries(dq, ds, k, KEYS_FIRST)
    dq_base = query_base(dq_ptr, first_row, head, heads * D, D, 1)
    store_queries(dq_base, start, row, rows, heads * D, dq, scale, BLOCK_M, D, WIDTH, KEYS_FIRST)


@triton.jit(do_not_specialize=INTEGERS)
def key_gradient_kernel(
    q_ptr, k_ptr, v_ptr, cu_q_ptr, cu_k_ptr, mask_ptr, seed_ptr,
    do_ptr, statistics_ptr, delta_ptr, dk_ptr, dv_ptr,
    heads, blocks, length, total_q, threshold,
    stride_qt, stride_qh, stride_kn, stride_kt, stride_kh, stride_vn, stride_vt, stride_vh,
    scale, scale_log2, inverse_keep,
    PACKED: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr, CAUSAL: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr,
    UPCAST: tl.constexpr, KEYS_FIRST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dK and dV of one block of keys of one segment and head."""
    block, head, segment, first_row, rows, first_key, keys = own_segment(
        cu_q_ptr, cu_k_ptr, heads, blocks, length, PACKED, BLOCK_N
    )
    if block >= keys:
        return
    key = block + tl.arange(0, BLOCK_N)
    visible = visible_keys(mask_ptr, first_key, key, keys, MASKED)
    q_base, k_base, v_base = input_bases(
        q_ptr, k_ptr, v_ptr, segment, head, first_row, first_key,
        stride_qt, stride_qh, stride_kn, stride_kt, stride_kh, stride_vn, stride_vt, stride_vh,
        PACKED, UNIT,
    )  # fmt: skip
    do_base = query_base(do_ptr, first_row, head, heads * D, D, 1)
    k = load_rows(k_base, block, visible, stride_kt * UNIT, BLOCK_N, D, WIDTH, UPCAST)
    v = load_rows(v_base, block, visible, stride_vt * UNIT, BLOCK_N, D, WIDTH, UPCAST)

    dk = zeros_of(BLOCK_N, WIDTH, not KEYS_FIRST)
    dv = zeros_of(BLOCK_N, WIDTH, not KEYS_FIRST)
    begin = 0
    if CAUSAL:  # the first row that attends a key of this block, down to a whole tile
        begin = tl.maximum(block + rows - keys, 0) // BLOCK_M * BLOCK_M
    for start in range(begin, rows, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        inside = row < rows
        q = load_rows(q_base, start, inside, stride_qt * UNIT, BLOCK_M, D, WIDTH, UPCAST)
        do = load_rows(do_base, start, inside, heads * D, BLOCK_M, D, WIDTH, UPCAST)
        at = head.to(tl.int64) * total_q + first_row + row
        top, log_total = load_statistics(statistics_ptr, heads, total_q, at, inside)
        delta = tl.load(delta_ptr + at, mask=inside, other=0.0)
        p = weights_tile(
            q, k, top, log_total, row, key, visible, keys - rows, first_row + start, block, head,
            seed_ptr, threshold, scale_log2, DROPOUT, CAUSAL, KEYS_FIRST, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        dv = add_to_values(dv, p, do, DROPOUT, KEYS_FIRST)
        ds = logit_gradient(p, v, do, delta, inverse_keep, DROPOUT, KEYS_FIRST)
        dk = add_to_keys(dk, ds, q, KEYS_FIRST)
    dk_base = query_base(dk_ptr, first_key, head, heads * D, D, 1)
    dv_base = query_base(dv_ptr, first_key, head, heads * D, D, 1)
    store_keys(
        dv_base, block, key < keys, visible, heads * D, dv, inverse_keep,
        BLOCK_N, D, WIDTH, KEYS_FIRST,
    )  # fmt: skip
    store_keys(
        dk_base, block, key < keys, visible, heads * D, dk, scale,
        BLOCK_N, D, WIDTH, KEYS_FIRST,
    )  # fmt: skip


def fused_tile(tiles: tuple[Tile, ...], sizes: host.Sizes, multiprocessors: int) -> Tile | None:
    """The lowest tile that holds all rows of a segment; None where the general path is due."""
    if sizes.programs(1) < multiprocessors:
        return None
    return next((tile for tile in tiles if tile.rows >= sizes.max_q), None)


def cross_attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    statistics: torch.Tensor,
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv in the inputs' shapes and dtypes, contiguous.

    grad [total_q, H, d] belongs to the output; out and statistics are the results of
    `cross_attention_forward`, whose other arguments return unchanged. Keys that no row attends have
    gradients of 0. Raises ValueError on inputs the kernels do not take.
    """
    if scale < 0:  # as in the forward pass
        q = -q
    inputs = (q, k, v, cu_seqlens_q, cu_seqlens_k, key_mask)
    sizes = host.check(*inputs, max_seqlen_q, max_seqlen_k)
    dq, dk, dv = (host.empty_result(t) for t in (q, k, v))
    shared = host.shared_arguments(sizes, *inputs, seed, abs(scale), dropout_p, causal)
    do, out = {"do_ptr": grad.contiguous()}, {"out_ptr": out.contiguous()}
    kept, by_key = {"statistics_ptr": statistics}, {"dk_ptr": dk, "dv_ptr": dv}
    tile = fused_tile(
        host.tiles_of(FUSED_TILES, FUSED_INTERPRETED, q), sizes, multiprocessors(q.device)
    )
    with on_device(q):
        if tile is not None:
            if tile.plain and key_mask is None and not dropout_p and not causal:
                tile = tile.plain
            own = do | out | kept | {"dq_ptr": dq} | by_key
            host.launch_tile(fused_gradient_kernel, tile, 1, shared, own)
        else:
            kept["delta_ptr"] = torch.empty_like(statistics[0])
            (tile,) = host.tiles_of(QUERY_TILES, QUERY_INTERPRETED, q)
            blocks = -(-max_seqlen_q // tile.rows)
            own = do | out | kept | {"dq_ptr": dq}
            host.launch_tile(query_gradient_kernel, tile, blocks, shared, own)
            (tile,) = host.tiles_of(KEY_TILES, KEY_INTERPRETED, q)
            blocks = -(-max_seqlen_k // tile.keys)
            host.launch_tile(key_gradient_kernel, tile, blocks, shared, do | kept | by_key)
    dq = -dq if scale < 0 else dq
    return host.rounded(dq, q), host.rounded(dk, k), host.rounded(dv, v)


def aot_cases() -> list[aot.Case]:
    """Every configuration of the kernels above, for ahead-of-time compilation."""
    shared = {"do_ptr": "*T", "statistics_ptr": "*fp32"}
    by_query = shared | {"out_ptr": "*T", "dq_ptr": "*T"}
    by_key = shared | {"dk_ptr": "*T", "dv_ptr": "*T"}
    delta = {"delta_ptr": "*fp32"}
    return [
        *host.tile_cases(fused_gradient_kernel, FUSED_TILES, by_query | by_key),
        *host.tile_cases(query_gradient_kernel, QUERY_TILES, by_query | delta),
        *host.tile_cases(key_gradient_kernel, KEY_TILES, by_key | delta),
    ]
