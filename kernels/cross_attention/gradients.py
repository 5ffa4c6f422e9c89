"""Device code of attention's backward pass: what a tile of queries and keys adds to the gradients.

Tiles of weights are keys x queries where KEYS_FIRST, else queries x keys. The first axis takes the
side of the tensor-core instructions that wants 64 rows, the second the one that takes 8. A thread
holds few rows of a tile and many columns, and so few numbers that belong to a query, of which there
are three, where queries come first.
"""

import triton
import triton.language as tl

from .tiles import keep_tile, load_rows


@triton.jit
def by_query(x, KEYS_FIRST: tl.constexpr):
    """A number for each query row as a factor of a tile of weights."""
    if KEYS_FIRST:
        return x[None, :]
    else:
        return x[:, None]


@triton.jit
def by_key(x, KEYS_FIRST: tl.constexpr):
    if KEYS_FIRST:
        return x[:, None]
    else:
        return x[None, :]


@triton.jit
def load_statistics(statistics_ptr, heads, total_q, at, inside):
    """Of each row the largest product and the logarithm of the sum of exponentials, to the base 2:
    +inf, which makes every weight 0, where a row attends no key or is not there."""
    top = tl.load(statistics_ptr + at, mask=inside, other=0.0)
    logs = statistics_ptr + heads.to(tl.int64) * total_q
    return top, tl.load(logs + at, mask=inside, other=float("inf"))


@triton.jit
def load_queries(
    q_base, do_base, out_base, statistics_ptr, start, rows, first_row, head, heads, total_q,
    stride_q, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """(q, dO, delta, largest products, logarithms of sums, rows [ROWS]) of a tile of query rows."""
    row = start + tl.arange(0, ROWS)
    inside = row < rows
    q = load_rows(q_base, start, inside, stride_q, ROWS, D, WIDTH, UPCAST)
    do = load_rows(do_base, start, inside, heads * D, ROWS, D, WIDTH, UPCAST)
    out = load_rows(out_base, start, inside, heads * D, ROWS, D, WIDTH, UPCAST)
    # The choice keeps the product out of the sum's first exchange between lanes, see UNFUSED.
    terms = tl.where(inside[:, None], do.to(tl.float32) * out.to(tl.float32), 0.0)
    delta = tl.sum(terms, 1)
    at = head.to(tl.int64) * total_q + first_row + row
    top, log_total = load_statistics(statistics_ptr, heads, total_q, at, inside)
    return q, do, delta, top, log_total, row


@triton.jit
def weights_tile(
    q, k, top, log_total, row, key, visible, ahead, first_row, first_key, head,
    seed_ptr, threshold, scale_log2,
    DROPOUT: tl.constexpr, CAUSAL: tl.constexpr, KEYS_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """P before dropout; the sign of weights that dropout takes is minus, so that one register holds
    a weight and its fate until dS needs both.

    The products were summed in another order in the forward pass: from about 1e8 on a product may
    exceed the largest one of then by so much that its exponential would overflow.
    """
    if KEYS_FIRST:
        s = tl.dot(k, tl.trans(q), input_precision="ieee")
    else:
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
    z = tl.minimum(s - by_query(top, KEYS_FIRST), 0.0) * scale_log2
    z -= by_query(log_total, KEYS_FIRST)
    attended = by_key(visible, KEYS_FIRST)
    if CAUSAL:
        attended = attended & (by_key(key, KEYS_FIRST) <= by_query(row + ahead, KEYS_FIRST))
    p = tl.exp2(tl.where(attended, z, -float("inf")))
    if DROPOUT:
        keep = keep_tile(tl.load(seed_ptr), first_row, first_key, head, threshold, BLOCK_M, BLOCK_N)
        if KEYS_FIRST:
            keep = tl.trans(keep)
        p = tl.where(keep, p, -p)
    return p


@triton.jit
def add_to_values(
    dv, p, do, DROPOUT: tl.constexpr, KEYS_FIRST: tl.constexpr
):  # fmt: skip
    """dV + P K dO, without the factor of K."""
    if DROPOUT:
        p = tl.where(p < 0, 0.0, p)
    return add_to_keys(dv, p.to(do.dtype), do, KEYS_FIRST)


@triton.jit
def logit_gradient(
    p, v, do, delta, inverse_keep,
    DROPOUT: tl.constexpr, KEYS_FIRST: tl.constexpr,
):  # fmt: skip
    """dS, in the dtype of dO."""
    if KEYS_FIRST:
        g = tl.dot(v, tl.trans(do), input_precision="ieee")
    else:
        g = tl.dot(do, tl.trans(v), input_precision="ieee")
    delta = by_query(delta, KEYS_FIRST)
    if DROPOUT:
        ds = p * tl.where(p < 0, delta, g * inverse_keep - delta)
    else:
        ds = p * (g - delta)
    return ds.to(do.dtype)


@triton.jit
def zeros_of(ROWS: tl.constexpr, WIDTH: tl.constexpr, TURNED: tl.constexpr):
    """Zeros in the place of rows [ROWS, WIDTH]; TURNED, [WIDTH, ROWS]."""
    if TURNED:
        return tl.zeros((WIDTH, ROWS), tl.float32)
    else:
        return tl.zeros((ROWS, WIDTH), tl.float32)


@triton.jit
def add_to_keys(total, weights, x, KEYS_FIRST: tl.constexpr):
    """total + weights^T x: rows of keys from rows of queries, turned unless KEYS_FIRST.

    The weights, which a matmul has left in registers, stay in their place among the factors, or
    become the second, which tensor cores read from shared memory whichever way it lies.
    """
    if KEYS_FIRST:
        return tl.dot(weights, x, total, input_precision="ieee")
    else:
        return tl.dot(tl.trans(x), weights, total, input_precision="ieee")


@triton.jit
def add_to_queries(total, weights, x, KEYS_FIRST: tl.constexpr):
    """total + weights x: rows of queries from rows of keys, turned where KEYS_FIRST."""
    if KEYS_FIRST:
        return tl.dot(tl.trans(x), weights, total, input_precision="ieee")
    else:
        return tl.dot(weights, x, total, input_precision="ieee")
