"""Device code shared by the attention kernels: segments, rows of a head, keys, dropout."""

import triton
import triton.language as tl


@triton.jit
def segment_rows(cu_ptr, segment, length, PACKED: tl.constexpr):
    """(first row, number of rows) of a segment in its packed tensor."""
    if PACKED:
        first = tl.load(cu_ptr + segment).to(tl.int64)
        count = (tl.load(cu_ptr + segment + 1).to(tl.int64) - first).to(tl.int32)
    else:
        first = segment.to(tl.int64) * length
        count = length
    return first, count


@triton.jit
def own_segment(
    cu_q_ptr, cu_k_ptr, heads, blocks, length, PACKED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """(start, head, segment, first row, rows, first key, keys) of this program.

    Its tile begins `start` rows or keys, a multiple of BLOCK, into the segment.
    """
    program = tl.program_id(0)
    start = program % blocks * BLOCK
    head = program // blocks % heads
    segment = program // blocks // heads
    first_row, rows = segment_rows(cu_q_ptr, segment, 0, True)
    first_key, keys = segment_rows(cu_k_ptr, segment, length, PACKED)
    return start, head, segment, first_row, rows, first_key, keys


@triton.jit
def query_base(ptr, first, head, stride_t, stride_h, UNIT: tl.constexpr):
    """Where the rows of one segment and head begin. Strides count units of UNIT elements, which
    tells the compiler that a vector of so many can be loaded at once."""
    return ptr + (first * stride_t + head.to(tl.int64) * stride_h) * UNIT


@triton.jit
def key_base(
    ptr, segment, first, head, stride_n, stride_t, stride_h,
    PACKED: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """`query_base` for keys and values, which have a stride between images when not packed."""
    if PACKED:
        at = first * stride_t
    else:
        at = segment.to(tl.int64) * stride_n
    return ptr + (at + head.to(tl.int64) * stride_h) * UNIT


@triton.jit
def input_bases(
    q_ptr, k_ptr, v_ptr, segment, head, first_row, first_key,
    stride_qt, stride_qh, stride_kn, stride_kt, stride_kh, stride_vn, stride_vt, stride_vh,
    PACKED: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Where the queries, keys and values of one segment and head begin."""
    q_base = query_base(q_ptr, first_row, head, stride_qt, stride_qh, UNIT)
    k_base = key_base(
        k_ptr, segment, first_key, head, stride_kn, stride_kt, stride_kh, PACKED, UNIT
    )
    v_base = key_base(
        v_ptr, segment, first_key, head, stride_vn, stride_vt, stride_vh, PACKED, UNIT
    )
    return q_base, k_base, v_base


@triton.jit
def tile_pointers(base, start, stride, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """64 bits for the start of a tile, 32 within it: half the registers."""
    first = base + tl.cast(start, tl.int64) * stride
    return first + (tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, WIDTH)[None, :])


@triton.jit
def inside_width(inside, AT: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """The mask of rows [n] as one of elements [n, WIDTH] from element AT of D on."""
    if D >= AT + WIDTH:
        mask = inside[:, None]
    else:
        mask = inside[:, None] & (tl.arange(0, WIDTH) < D - AT)[None, :]
    return mask


@triton.jit
def load_rows(
    base, start, inside, stride, ROWS: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, UPCAST: tl.constexpr, AT: tl.constexpr = 0,
):  # fmt: skip
    """Rows [ROWS, WIDTH] from `start` on, from their element AT on, with zeros outside: what is
    masked is not even read.

    UPCAST widens them (the interpreter multiplies bf16 bit patterns as integers).
    """
    at = tile_pointers(base + AT, start, stride, ROWS, WIDTH)
    x = tl.load(at, mask=inside_width(inside, AT, D, WIDTH), other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def store_rows(
    base, start, inside, stride, x, ROWS: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, AT: tl.constexpr = 0,
):  # fmt: skip
    at = tile_pointers(base + AT, start, stride, ROWS, WIDTH)
    tl.store(at, x.to(base.dtype.element_ty), mask=inside_width(inside, AT, D, WIDTH))


@triton.jit
def visible_keys(mask_ptr, first, key, keys, MASKED: tl.constexpr):
    """Which keys of the segment that begins at `first` exist and are not masked, [n]."""
    visible = key < keys
    if MASKED:
        visible = visible & (tl.load(mask_ptr + first + key, mask=visible, other=0) != 0)
    return visible


@triton.jit
def keep_tile(
    seed, first_row, first_key, head, threshold, ROWS: tl.constexpr, KEYS: tl.constexpr
):  # fmt: skip
    """Which weights dropout keeps, [ROWS, KEYS]: fastvlp/ops/cross_attention/dropout.py defines it.

    first_row counts over the packed queries, first_key within the segment, a multiple of 4: the
    four words of one counter belong to four neighbouring keys. `threshold` is the bit pattern of
    an unsigned word.
    """
    row = (first_row + tl.arange(0, ROWS)).to(tl.uint32)
    group = first_key // 4 + tl.arange(0, KEYS // 4)
    threshold = threshold.to(tl.uint32, bitcast=True)
    w0, w1, w2, w3 = tl.philox(seed, group[None, :], row[:, None], head, 0)
    even = tl.join(w0 >= threshold, w2 >= threshold)
    odd = tl.join(w1 >= threshold, w3 >= threshold)
    return tl.reshape(tl.join(even, odd), (ROWS, KEYS))
