"""Gradients of attention of packed queries to the keys of their segment.

With P the softmax, K the dropout factors (0 or 1 / (1 - p)), delta = rowsum(dO * O):

    dV = (P K)^T dO,   dS = P (K (dO V^T) - delta),   dQ = scale dS k,   dK = scale dS^T q

P comes again from the products and the statistics of the forward pass. Every element of a gradient
is summed by one program in a fixed order: no atomics, the same bits on every run.

Short queries, all rows of a segment in one tile: one program per segment and head walks the keys
once, writes their dK and dV and keeps dQ: five GEMMs. Longer queries, or too few segments and
heads to employ every multiprocessor: a kernel over tiles of queries makes dQ and delta, one over
blocks of keys dK and dV: seven GEMMs, but programs in plenty.

Tiles are keys x queries, dQ is kept transposed: keys and the head width, 32 and more, take the side
of the tensor-core instructions that wants 64 rows, queries, perhaps 32, the side that takes 8.
"""

import torch
import triton
import triton.language as tl

from .._core import aot
from .._core.launch import on_device
from .._core.support import triton_before
from . import host
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

# The largest tiles that spill with no Triton from 3.6 on (3.8 alone would take 64 x 64 and 128 x 32
# at 64 wide on sm_80 and sm_90). Without wgmma the queries of a tile are an operand that every warp
# holds in registers: at 128 wide that leaves room for 16 rows, and more take the general path.
FUSED_TILES: Table = {
    (80, 2, 64): (Tile(32, 32, 4, 2), Tile(128, 32, 8, 2)),
    (80, 2, 128): (Tile(16, 32, 4, 2),),
    (80, 4, 64): (Tile(32, 32, 4, 1),),
    (80, 4, 128): (Tile(32, 16, 8, 1),),
    (90, 2, 64): (Tile(32, 64, 4, 2), Tile(64, 32, 8, 2), Tile(128, 16, 8, 2)),
    (90, 2, 128): (Tile(32, 32, 8, 2), Tile(64, 32, 8, 2)),
    (90, 4, 64): (Tile(32, 32, 8, 1),),
    (90, 4, 128): (Tile(32, 16, 16, 1),),
    (100, 2, 64): (Tile(32, 64, 4, 2), Tile(64, 64, 8, 2), Tile(128, 32, 8, 2)),
    (100, 2, 128): (Tile(32, 32, 4, 2), Tile(64, 32, 8, 2), Tile(128, 16, 8, 2)),
    (100, 4, 64): (Tile(32, 32, 8, 1),),
    (100, 4, 128): (Tile(32, 16, 8, 1),),
    (120, 2, 64): (Tile(32, 64, 4, 1), Tile(128, 16, 8, 2)),
    (120, 2, 128): (Tile(16, 32, 4, 2),),
    (120, 4, 64): (Tile(32, 32, 8, 1),),
    (120, 4, 128): (Tile(32, 16, 16 if triton_before(3, 8) else 8, 1),),
}
QUERY_TILES: Table = {
    (80, 2, 64): (Tile(32, 64, 4, 2),),
    (80, 2, 128): (Tile(32, 64, 8, 2),),
    (80, 4, 64): (Tile(32, 32, 8, 1),),
    (80, 4, 128): (Tile(32, 32, 8, 1),),
    (90, 2, 64): (Tile(64, 64, 8, 2),),
    (90, 2, 128): (Tile(64, 32, 8, 2),),
    (90, 4, 64): (Tile(32, 32, 8, 1),),
    (90, 4, 128): (Tile(32, 32, 8, 1),),
    (100, 2, 64): (Tile(64, 64, 8, 2),),
    (100, 2, 128): (Tile(64, 64, 8, 2),),
    (100, 4, 64): (Tile(32, 32, 8, 1),),
    (100, 4, 128): (Tile(32, 32, 8, 1),),
    (120, 2, 64): (Tile(32, 64, 4, 2),),
    (120, 2, 128): (Tile(32, 64, 8, 2),),
    (120, 4, 64): (Tile(32, 32, 8, 1),),
    (120, 4, 128): (Tile(32, 32, 8, 1),),
}
KEY_TILES: Table = {
    (80, 2, 64): (Tile(32, 64, 8, 2),),
    (80, 2, 128): (Tile(32, 64, 8, 2),),
    (80, 4, 64): (Tile(32, 32, 8, 1),),
    (80, 4, 128): (Tile(32, 16, 8, 1),),
    (90, 2, 64): (Tile(64, 64, 4, 2),),
    (90, 2, 128): (Tile(64, 64, 8, 2),),
    (90, 4, 64): (Tile(32, 32, 8, 1),),
    (90, 4, 128): (Tile(32, 16, 8, 1),),
    (100, 2, 64): (Tile(64, 64, 4, 2),),
    (100, 2, 128): (Tile(64, 64, 8, 2),),
    (100, 4, 64): (Tile(32, 32, 8, 1),),
    (100, 4, 128): (Tile(32, 16, 8, 1),),
    (120, 2, 64): (Tile(32, 64, 8, 2),),
    (120, 2, 128): (Tile(32, 64, 8, 2),),
    (120, 4, 64): (Tile(32, 32, 8, 1),),
    (120, 4, 128): (Tile(32, 16, 8, 1),),
}
FUSED_INTERPRETED = (Tile(32, 32, 4, 1), Tile(128, 64, 4, 1))
GENERAL_INTERPRETED = (Tile(32, 64, 4, 1),)


@triton.jit
def load_statistics(statistics_ptr, heads, total_q, at, inside):
    """Of each row the largest product and the logarithm of the sum of exponentials, to the base 2:
    +inf, which makes every weight 0, where a row attends no key or is not there."""
    top = tl.load(statistics_ptr + at, mask=inside, other=0.0)
    logs = statistics_ptr + heads.to(tl.int64) * total_q
    return top, tl.load(logs + at, mask=inside, other=float("inf"))


@triton.jit
def weights_tile(
    q, k, top, log_total, row, key, visible, ahead, first_row, first_key, head,
    seed_ptr, threshold, scale_log2,
    DROPOUT: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """P before dropout, keys x queries, [N, M]; the sign of weights that dropout takes is minus,
    so that one register holds a weight and its fate until dS needs both.

    The products were summed in another order in the forward pass: from about 1e8 on a product may
    exceed the largest one of then by so much that its exponential would overflow.
    """
    s = tl.dot(k, tl.trans(q), input_precision="ieee")
    z = tl.minimum(s - top[None, :], 0.0) * scale_log2 - log_total[None, :]
    attended = visible[:, None]
    if CAUSAL:
        attended = attended & (key[:, None] <= row[None, :] + ahead)
    p = tl.exp2(tl.where(attended, z, -float("inf")))
    if DROPOUT:
        keep = tl.trans(
            keep_tile(tl.load(seed_ptr), first_row, first_key, head, threshold, BLOCK_M, BLOCK_N)
        )
        p = tl.where(keep, p, -p)
    return p


@triton.jit
def value_gradient(p, do, start, DROPOUT: tl.constexpr):
    """start + P K dO, without the factor of K."""
    if DROPOUT:
        p = tl.where(p < 0, 0.0, p)
    return tl.dot(p.to(do.dtype), do, start, input_precision="ieee")


@triton.jit
def logit_gradient(p, v, do, delta, inverse_keep, DROPOUT: tl.constexpr):
    """dS, keys x queries, [N, M]."""
    g = tl.dot(v, tl.trans(do), input_precision="ieee")
    if DROPOUT:
        return p * tl.where(p < 0, delta[None, :], g * inverse_keep - delta[None, :])
    else:
        return p * (g - delta[None, :])


@triton.jit(do_not_specialize=INTEGERS)
def query_gradient_kernel(
    q_ptr, k_ptr, v_ptr, cu_q_ptr, cu_k_ptr, mask_ptr, seed_ptr,
    do_ptr, out_ptr, statistics_ptr, delta_ptr, dq_ptr, dk_ptr, dv_ptr,
    heads, blocks, length, total_q, threshold,
    stride_qt, stride_qh, stride_kn, stride_kt, stride_kh, stride_vn, stride_vt, stride_vh,
    scale, scale_log2, inverse_keep,
    PACKED: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr, CAUSAL: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, UPCAST: tl.constexpr,
    FUSED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of query rows of one segment and head; FUSED, which needs all its rows in
    the tile: dK and dV of the segment as well, else delta for the other kernel."""
    start, head, segment, first_row, rows, first_key, keys = own_segment(
        cu_q_ptr, cu_k_ptr, heads, blocks, length, PACKED, BLOCK_M
    )
    if not FUSED:
        if start >= rows:
            return
    row = start + tl.arange(0, BLOCK_M)
    inside = row < rows
    q_base, k_base, v_base = input_bases(
        q_ptr, k_ptr, v_ptr, segment, head, first_row, first_key,
        stride_qt, stride_qh, stride_kn, stride_kt, stride_kh, stride_vn, stride_vt, stride_vh,
        PACKED, UNIT,
    )  # fmt: skip
    do_base = query_base(do_ptr, first_row, head, heads * D, D, 1)
    out_base = query_base(out_ptr, first_row, head, heads * D, D, 1)
    dk_base = query_base(dk_ptr, first_key, head, heads * D, D, 1)
    dv_base = query_base(dv_ptr, first_key, head, heads * D, D, 1)
    q = load_rows(q_base, start, inside, stride_qt * UNIT, BLOCK_M, D, WIDTH, UPCAST)
    do = load_rows(do_base, start, inside, heads * D, BLOCK_M, D, WIDTH, UPCAST)
    out = load_rows(out_base, start, inside, heads * D, BLOCK_M, D, WIDTH, UPCAST)
    # The choice keeps the product out of the sum's first exchange between lanes, see UNFUSED.
    terms = tl.where(inside[:, None], do.to(tl.float32) * out.to(tl.float32), 0.0)
    delta = tl.sum(terms, 1)
    at = head.to(tl.int64) * total_q + first_row + row
    top, log_total = load_statistics(statistics_ptr, heads, total_q, at, inside)
    if not FUSED:
        tl.store(delta_ptr + at, delta, mask=inside)

    dq = tl.zeros((WIDTH, BLOCK_M), tl.float32)
    end = keys
    if CAUSAL and not FUSED:
        end = tl.minimum(keys, start + BLOCK_M + keys - rows)
    for block in range(0, end, BLOCK_N):
        key = block + tl.arange(0, BLOCK_N)
        visible = visible_keys(mask_ptr, first_key, key, keys, MASKED)
        k = load_rows(k_base, block, visible, stride_kt * UNIT, BLOCK_N, D, WIDTH, UPCAST)
        v = load_rows(v_base, block, visible, stride_vt * UNIT, BLOCK_N, D, WIDTH, UPCAST)
        p = weights_tile(
            q, k, top, log_total, row, key, visible, keys - rows, first_row + start, block, head,
            seed_ptr, threshold, scale_log2, DROPOUT, CAUSAL, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        if FUSED:
            # A selection for masked keys: a NaN in a query must not reach them either.
            used = visible[:, None] & (rows > 0)
            zero = tl.zeros((BLOCK_N, WIDTH), tl.float32)
            dv = tl.where(used, value_gradient(p, do, zero, DROPOUT) * inverse_keep, 0.0)
            store_rows(dv_base, block, key < keys, heads * D, dv, BLOCK_N, D, WIDTH)
        ds = logit_gradient(p, v, do, delta, inverse_keep, DROPOUT).to(q.dtype)
        if FUSED:
            dk = tl.where(used, tl.dot(ds, q, zero, input_precision="ieee") * scale, 0.0)
            store_rows(dk_base, block, key < keys, heads * D, dk, BLOCK_N, D, WIDTH)
        dq = tl.dot(tl.trans(k), ds, dq, input_precision="ieee")
    dq_base = query_base(dq_ptr, first_row, head, heads * D, D, 1)
    store_rows(dq_base, start, inside, heads * D, tl.trans(dq * scale), BLOCK_M, D, WIDTH)


@triton.jit(do_not_specialize=INTEGERS)
def key_gradient_kernel(
    q_ptr, k_ptr, v_ptr, cu_q_ptr, cu_k_ptr, mask_ptr, seed_ptr,
    do_ptr, statistics_ptr, delta_ptr, dk_ptr, dv_ptr,
    heads, blocks, length, total_q, threshold,
    stride_qt, stride_qh, stride_kn, stride_kt, stride_kh, stride_vn, stride_vt, stride_vh,
    scale, scale_log2, inverse_keep,
    PACKED: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr, CAUSAL: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
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

    dk = tl.zeros((BLOCK_N, WIDTH), tl.float32)
    dv = tl.zeros((BLOCK_N, WIDTH), tl.float32)
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
            seed_ptr, threshold, scale_log2, DROPOUT, CAUSAL, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        dv = value_gradient(p, do, dv, DROPOUT)
        ds = logit_gradient(p, v, do, delta, inverse_keep, DROPOUT)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    used = visible[:, None]
    dk = tl.where(used, dk * scale, 0.0)
    dv = tl.where(used, dv * inverse_keep, 0.0)
    dk_base = query_base(dk_ptr, first_key, head, heads * D, D, 1)
    dv_base = query_base(dv_ptr, first_key, head, heads * D, D, 1)
    store_rows(dk_base, block, key < keys, heads * D, dk, BLOCK_N, D, WIDTH)
    store_rows(dv_base, block, key < keys, heads * D, dv, BLOCK_N, D, WIDTH)


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
    shared = host.launch_arguments(sizes, *inputs, seed, abs(scale), dropout_p, causal)
    shared |= {"do_ptr": grad.contiguous(), "dk_ptr": dk, "dv_ptr": dv}
    shared["statistics_ptr"] = statistics
    by_query = {"out_ptr": out.contiguous(), "dq_ptr": dq}
    tile = fused_tile(
        host.tiles_of(FUSED_TILES, FUSED_INTERPRETED, q), sizes, host.multiprocessors(q.device)
    )
    with on_device(q):
        if tile is not None:
            _launch(
                query_gradient_kernel, sizes, 1, tile, shared | by_query,
                delta_ptr=statistics, FUSED=True,
            )  # fmt: skip
        else:
            delta = torch.empty_like(statistics[0])
            (tile,) = host.tiles_of(QUERY_TILES, GENERAL_INTERPRETED, q)
            blocks = triton.cdiv(max_seqlen_q, tile.rows)
            _launch(
                query_gradient_kernel, sizes, blocks, tile, shared | by_query,
                delta_ptr=delta, FUSED=False,
            )  # fmt: skip
            (tile,) = host.tiles_of(KEY_TILES, GENERAL_INTERPRETED, q)
            blocks = triton.cdiv(max_seqlen_k, tile.keys)
            _launch(key_gradient_kernel, sizes, blocks, tile, shared, delta_ptr=delta)
    dq = -dq if scale < 0 else dq
    return host.rounded(dq, q), host.rounded(dk, k), host.rounded(dv, v)


def _launch(kernel, sizes: host.Sizes, blocks: int, tile: Tile, arguments: dict, **more) -> None:
    programs = sizes.programs(blocks)
    if programs and sizes.width:
        kernel[(programs,)](blocks=blocks, **arguments, **more, **host.tile_arguments(tile))


def aot_cases() -> list[aot.Case]:
    """Every configuration of the kernels above, for ahead-of-time compilation."""
    by_key = {"do_ptr": "*T", "dk_ptr": "*T", "dv_ptr": "*T"} | {
        "statistics_ptr": "*fp32", "delta_ptr": "*fp32"
    }  # fmt: skip
    by_query = by_key | {"out_ptr": "*T", "dq_ptr": "*T"}
    fused, split = {"FUSED": True}, {"FUSED": False}
    cases = host.tile_cases(
        query_gradient_kernel, FUSED_TILES, by_query, constants=fused, label="-fused"
    )
    cases += host.tile_cases(query_gradient_kernel, QUERY_TILES, by_query, constants=split)
    cases += host.tile_cases(key_gradient_kernel, KEY_TILES, by_key)
    return cases
