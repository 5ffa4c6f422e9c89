"""The pass over the keys of the momentum-contrastive loss: one launch for all rows.

Rows of both directions, students and teachers, and for ids the rows' positives, meet the keys of
their direction in slices. Per slice and row there remain

    reference  the largest logit s_ij = <q_i, K_j> / t
    sum        sum_j exp(s_ij - reference)
    keys       sum_j exp(s_ij - reference) K_j

A row's positives weigh 1 and need no reference. Slice 0 is the batch, in which a row's own pair
weighs 0, and there the hard negatives are sampled as well; the other slices share the queue.
"""

import triton
import triton.language as tl

from .._core import aot
from .._core.tiles import exp_difference
from .negatives import sample_negatives
from .tiles import AOT_TILED, WIDEST, aot_kinds, load_rows, select_side

# Stands for the logit of what is not a key. Finite, so that no difference of two is NaN.
EXCLUDED = tl.constexpr(-2e38)
NOTHING_SEEN = tl.constexpr(-1e38)


@triton.jit
def load_queries(
    student_ptr, teacher_ptr, own, taught, stride_student, stride_teacher, depth, D,
    TEACHER: tl.constexpr, EVEN_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Features of students, and of teachers where `taught`; columns past the end are 0."""
    own = own.to(tl.int64)[:, None]
    at = student_ptr + own * stride_student + depth[None, :]
    if TEACHER:
        taught_at = teacher_ptr + own * stride_teacher + depth[None, :]
        at = tl.where(taught[:, None], taught_at, at)
    if EVEN_D:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=(depth < D)[None, :], other=0.0)
    return x.to(tl.float32) if UPCAST else x


@triton.jit(do_not_specialize=["B", "slices"])
def keys_kernel(
    image_ptr, text_ptr, image_momentum_ptr, text_momentum_ptr, image_queue_ptr, text_queue_ptr,
    ids_ptr, queue_ids_ptr, length_ptr, temperature_ptr, seed_ptr,
    reference_ptr, sum_ptr, keys_ptr, text_negative_ptr, image_negative_ptr, B, D, slices,
    stride_image, stride_text, stride_image_momentum, stride_text_momentum, stride_image_queue,
    stride_text_queue,
    TEACHER: tl.constexpr, IDS: tl.constexpr, FACTOR: tl.constexpr, NEGATIVES: tl.constexpr,
    ONE_BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, EVEN_D: tl.constexpr,
):  # fmt: skip
    """Slice program_id(2) of the keys for a block of rows: reference, sum [2, slices, R], keys.

    R = (1 + TEACHER + IDS) B rows: students, teachers, positives. program_id(1): the direction, of
    image rows (0) or of text rows (1), for each block of columns. Weights are stored times FACTOR.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    direction, part = tl.program_id(1) % 2, tl.program_id(1) // 2
    slice_ = tl.program_id(2)
    column = part * BLOCK_D + tl.arange(0, BLOCK_D)
    depth = tl.arange(0, BLOCK_K)
    rows = B * (1 + TEACHER + IDS)
    own, kind = row % B, row // B
    is_taught, is_positive = kind == 1, kind == 1 + TEACHER

    student_ptr, stride_student = select_side(
        direction, image_ptr, stride_image, text_ptr, stride_text
    )
    teacher_ptr, stride_teacher = select_side(
        direction, image_momentum_ptr, stride_image_momentum, text_momentum_ptr,
        stride_text_momentum,
    )  # fmt: skip
    batch_ptr, stride_batch = select_side(
        direction, text_momentum_ptr, stride_text_momentum, image_momentum_ptr,
        stride_image_momentum,
    )  # fmt: skip
    key_ptr, stride_key = select_side(
        direction, text_queue_ptr, stride_text_queue, image_queue_ptr, stride_image_queue
    )
    key_ids_ptr = queue_ids_ptr
    length = tl.load(length_ptr).to(tl.int32)
    step = tl.cdiv(tl.cdiv(length, slices - 1), BLOCK_N) * BLOCK_N
    begin = tl.minimum((slice_ - 1) * step, length)
    end = tl.minimum(begin + step, length)
    if slice_ == 0:
        key_ptr, stride_key, key_ids_ptr, begin, end = batch_ptr, stride_batch, ids_ptr, B * 0, B

    inverse = 1.0 / tl.load(temperature_ptr)
    reference = tl.full((BLOCK_M,), NOTHING_SEEN, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    keys = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if ONE_BLOCK:
        query = load_queries(
            student_ptr, teacher_ptr, own, is_taught, stride_student, stride_teacher, column, D,
            TEACHER, EVEN_D, UPCAST,
        )  # fmt: skip
    if IDS:
        row_id = tl.load(ids_ptr + own)
    for start in range(begin, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        k = load_rows(key_ptr, key, end - 1, stride_key, column, D, EVEN_D, UPCAST)
        if ONE_BLOCK:
            s = tl.dot(query, tl.trans(k), input_precision=PRECISION)
        else:
            s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for at in range(0, D, BLOCK_K):
                q_part = load_queries(
                    student_ptr, teacher_ptr, own, is_taught, stride_student, stride_teacher,
                    at + depth, D, TEACHER, EVEN_D, UPCAST,
                )  # fmt: skip
                k_part = load_rows(key_ptr, key, end - 1, stride_key, at + depth, D, EVEN_D, UPCAST)
                s = tl.dot(q_part, tl.trans(k_part), s, input_precision=PRECISION)
        counts = (key < end)[None, :] & ((slice_ > 0) | (key[None, :] != own[:, None]))
        s = tl.where(counts, s * inverse, EXCLUDED)
        raised = tl.maximum(reference, tl.max(s, 1))
        change = exp_difference(reference, raised)
        weight = exp_difference(s, raised[:, None])
        if IDS:
            key_id = tl.load(key_ids_ptr + tl.minimum(key, end - 1))
            is_equal = counts & (key_id[None, :] == row_id[:, None])
            weight = tl.where(is_positive[:, None], tl.where(is_equal, 1.0, 0.0), weight)
            change = tl.where(is_positive, 1.0, change)
        total = total * change + tl.sum(weight, 1)
        keys = keys * change[:, None]
        reference = raised
        weight = (weight * FACTOR).to(k.dtype)
        keys = tl.dot(weight, k, keys, input_precision=PRECISION)

    first = (direction * slices + slice_).to(tl.int64) * rows + tl.program_id(0) * BLOCK_M
    line = tl.arange(0, BLOCK_M)
    inside = line < rows - tl.program_id(0) * BLOCK_M
    tl.store(reference_ptr + first + line, reference, mask=inside & (part == 0))
    tl.store(sum_ptr + first + line, total, mask=inside & (part == 0))
    # 64 bits for the start of a block, 32 within it: half the registers.
    at = line[:, None] * D + column[None, :]
    mask = inside[:, None]
    if not EVEN_D:
        mask = mask & (column < D)[None, :]
    tl.store(keys_ptr + first * D + at, keys, mask=mask)
    if NEGATIVES:
        if (slice_ == 0) & (part == 0) & (tl.program_id(0) * BLOCK_M < B):
            negative_ptr, _ = select_side(direction, text_negative_ptr, 0, image_negative_ptr, 0)
            sample_negatives(
                student_ptr, batch_ptr, ids_ptr, inverse, seed_ptr, negative_ptr, row,
                B, D, stride_student, stride_batch, direction,
                IDS, BLOCK_M, BLOCK_K, EVEN_D, UPCAST, PRECISION,
            )  # fmt: skip


def aot_cases() -> list[aot.Case]:
    """Every configuration of the kernel above, for ahead-of-time compilation."""
    every = {"TEACHER": True, "IDS": False, "NEGATIVES": True, "FACTOR": 1.0, "ONE_BLOCK": True,
             "BLOCK_D": WIDEST} | AOT_TILED  # fmt: skip
    cases = []
    for label, types, constants in (
        ("keys", ("bf16", "fp16", "fp32"), every),
        ("keys-ids", ("bf16", "fp32"), every | {"IDS": True}),
        ("keys-wide", ("bf16", "fp32"), every | {"IDS": True, "ONE_BLOCK": False}),
        ("keys-ragged", ("bf16",), every | {"IDS": True, "EVEN_D": False, "BLOCK_D": 128}),
    ):
        cases += aot_kinds(keys_kernel, label, types, constants)
    return cases
