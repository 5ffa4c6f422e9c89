"""Losses and gradients of the momentum-contrastive step from what its slices of the keys left.

With o a row's own logit and u = log sum_{j != i} exp(s_ij) - o, lse_i - o = softplus(u), and 1 less
the own pair's probability is sigmoid(u): a row that is fitted well keeps its small loss and
gradient, where lse_i - o and p_ii - 1 would cancel.
"""

import triton
import triton.language as tl

from .._core import aot
from .._core.tiles import LOG2E, exp_difference
from ..contrastive.sigmoid import log1p_unit
from .keys import NOTHING_SEEN
from .tiles import WIDEST, aot_kinds, power_of_two, select_side

WARPS = 8
# Of a row's keys in its slices, elements that are read at a time.
ELEMENTS = 8192


@triton.jit
def add_slices(
    keys_ptr, reference_ptr, at, stride, slices, highest, column, D,
    WEIGHTED: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum of a row's keys over the slices, each by exp(reference - highest) if WEIGHTED.

    at: where slice 0 has the row; stride: rows from one slice to the next.
    """
    found = tl.zeros((STEP, BLOCK_D), tl.float32)
    for start in range(0, slices, STEP):
        slice_ = start + tl.arange(0, STEP)
        place = at + slice_.to(tl.int64) * stride
        inside = (slice_ < slices)[:, None] & (column < D)[None, :]
        keys = tl.load(keys_ptr + place[:, None] * D + column[None, :], mask=inside, other=0.0)
        if WEIGHTED:
            reference = tl.load(reference_ptr + place, mask=slice_ < slices, other=NOTHING_SEEN)
            keys *= exp_difference(reference, highest)[:, None]
        found += keys
    return tl.sum(found, 0)


@triton.jit
def merge_slices(
    reference_ptr, sum_ptr, keys_ptr, at, stride, slices, own, column, D,
    FACTOR: tl.constexpr, MOST_SLICES: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(lse - own, weighted mean of the keys other than the own pair's, their weight) of one row."""
    slice_ = tl.arange(0, MOST_SLICES)
    place = at + slice_.to(tl.int64) * stride
    sums = tl.load(sum_ptr + place, mask=slice_ < slices, other=0.0)
    references = tl.load(reference_ptr + place, mask=slice_ < slices, other=NOTHING_SEEN)
    highest = tl.max(references, 0)
    total = tl.sum(sums * exp_difference(references, highest), 0)
    u = highest - own + tl.log(total)  # -inf where there is no other key
    e = tl.exp2(-tl.abs(u) * LOG2E)
    # A comparison and a selection, where a maximum could drop a NaN.
    excess = tl.where(u < 0, 0.0, u) + log1p_unit(e)
    other_share = tl.where(u < 0, e, 1.0) / (1.0 + e)
    weight = tl.where(total == 0, 0.0, other_share / total) / FACTOR
    found = add_slices(
        keys_ptr, reference_ptr, at, stride, slices, highest, column, D, True, STEP, BLOCK_D
    )
    return excess, found * weight, other_share


@triton.jit(do_not_specialize=["B", "slices"])
def merge_kernel(
    image_ptr, text_ptr, image_momentum_ptr, text_momentum_ptr, temperature_ptr, alpha_ptr,
    reference_ptr, sum_ptr, keys_ptr, d_image_ptr, d_text_ptr, loss_ptr, d_temperature_ptr,
    B, D, slices, stride_image, stride_text, stride_image_momentum, stride_text_momentum, share,
    TEACHER: tl.constexpr, IDS: tl.constexpr, FACTOR: tl.constexpr, GRADIENTS: tl.constexpr,
    MOST_SLICES: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One row of direction program_id(1): `share` times its loss, its gradient [D] and its part of
    the temperature's gradient."""
    row, direction = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, BLOCK_D)
    inside = column < D
    student_ptr, stride_student = select_side(
        direction, image_ptr, stride_image, text_ptr, stride_text
    )
    teacher_ptr, stride_teacher = select_side(
        direction, image_momentum_ptr, stride_image_momentum, text_momentum_ptr,
        stride_text_momentum,
    )  # fmt: skip
    own_ptr, stride_own = select_side(
        direction, text_momentum_ptr, stride_text_momentum, image_momentum_ptr,
        stride_image_momentum,
    )  # fmt: skip
    student = tl.load(student_ptr + row * stride_student + column, mask=inside, other=0.0)
    own_key = tl.load(own_ptr + row * stride_own + column, mask=inside, other=0.0)
    student, own_key = student.to(tl.float32), own_key.to(tl.float32)
    inverse = 1.0 / tl.load(temperature_ptr)
    own = tl.sum(student * own_key, 0) * inverse
    stride = B * (1 + TEACHER + IDS)
    at = direction.to(tl.int64) * slices * stride + row
    excess, mean, other_share = merge_slices(
        reference_ptr, sum_ptr, keys_ptr, at, stride, slices, own, column, D, FACTOR, MOST_SLICES,
        STEP, BLOCK_D,
    )  # fmt: skip
    alpha = 0.0
    taught = tl.zeros_like(own_key)
    taught_share = 0.0
    if TEACHER:
        alpha = tl.load(alpha_ptr)
        teacher = tl.load(teacher_ptr + row * stride_teacher + column, mask=inside, other=0.0)
        teacher_own = tl.sum(teacher.to(tl.float32) * own_key, 0) * inverse
        _, taught, taught_share = merge_slices(
            reference_ptr, sum_ptr, keys_ptr, at + B, stride, slices, teacher_own, column, D,
            FACTOR, MOST_SLICES, STEP, BLOCK_D,
        )  # fmt: skip
        # Not 0 * NaN: at alpha 0 the teacher has no say, whatever it says.
        taught = tl.where(alpha == 0, 0.0, alpha * taught)
        taught_share = tl.where(alpha == 0, 0.0, alpha * taught_share)
    count = 1.0
    others = tl.zeros_like(own_key)
    if IDS:
        at += B * (1 + TEACHER)
        slice_ = tl.arange(0, MOST_SLICES)
        place = at + slice_.to(tl.int64) * stride
        count += tl.sum(tl.load(sum_ptr + place, mask=slice_ < slices, other=0.0), 0)
        others = add_slices(
            keys_ptr, reference_ptr, at, stride, slices, 0.0, column, D, False, STEP, BLOCK_D
        )
    hard = (1.0 - alpha) / count
    target = taught + (hard / FACTOR) * others
    target_share = taught_share + hard * (count - 1.0)
    loss = excess - (tl.sum(student * target, 0) * inverse - target_share * own)
    gradient = mean - target + (target_share - other_share) * own_key
    gradient = gradient * (inverse * share)
    tl.store(loss_ptr + direction * B + row, loss * share)
    tl.store(d_temperature_ptr + direction * B + row, -tl.sum(student * gradient, 0) * inverse)
    if GRADIENTS:
        gradient = gradient.to(d_image_ptr.dtype.element_ty)
        out_ptr, _ = select_side(direction, d_image_ptr, D, d_text_ptr, D)
        tl.store(out_ptr + row * D + column, gradient, mask=inside)


def merge_constants(slices: int, width: int) -> dict[str, int]:
    """The sizes that the kernel is compiled for."""
    most, block_d = power_of_two(slices), power_of_two(width)
    step = max(1, min(most, ELEMENTS // block_d))
    return {"MOST_SLICES": most, "STEP": step, "BLOCK_D": block_d}


def aot_cases() -> list[aot.Case]:
    """The kernel above for ahead-of-time compilation, with all that it may have to merge."""
    constants = {"TEACHER": True, "IDS": True, "GRADIENTS": True, "FACTOR": 1.0}
    constants |= merge_constants(128, WIDEST)
    return aot_kinds(
        merge_kernel, "merge", ("bf16", "fp32"), constants, warps=WARPS, tensor_cores=False,
        fusion=False,
    )  # fmt: skip
