"""The momentum-contrastive loss, its gradient and its hard negatives (ALBEF).

Student and teacher rows both attend to the keys K = [batch ; queue] of the other modality: with
s_ij = <q_i, K_j> / t, a row needs lse_i = log sum_j exp(s_ij) and E_i = sum_j softmax_j(s_i) K_j.
From these follow, with E' of the teacher's row and C the mean of the row's positive keys,

    loss_i = lse_i - <f_i, alpha E'_i + (1 - alpha) C_i> / t
    dloss_i / df_i = (E_i - alpha E'_i - (1 - alpha) C_i) / t

because sum_j y_ij s_ij is linear in the keys. So one pass over the keys gives both, in slices that
leave mergeable (reference, sum, weighted keys), which a second kernel merges in a fixed order.

A row's own pair is left out of the slices. With o its logit and u = log sum_{j != i} exp(s_ij) - o,
lse_i - o = softplus(u), and 1 less the own pair's probability is sigmoid(u): a row that is fitted
well keeps its small loss and gradient, where lse_i - o and p_ii - 1 would cancel.
`sample_negatives` samples the negatives.

Memory: for each of `SLICES` slices two fp32 copies of the features. Nothing of size B x Q.
"""

import torch
import triton
import triton.language as tl

from .._core import aot
from .._core.launch import INTERPRETED, UNFUSED, launch_options, on_device
from .._core.tiles import LOG2E, exp_difference
from ..contrastive.sigmoid import log1p_unit
from .negatives import sample_negatives
from .tiles import AOT_TILED, aot_kinds, load_rows, tile_constants, tile_of

# Blocks of keys in flight fill a GPU: one slice for the batch, the others for the queue.
SLICES = 4 if INTERPRETED else 33

# Stands for the logit of what is not a key. Finite, so that no difference of two is NaN.
EXCLUDED = tl.constexpr(-2e38)
NOTHING_SEEN = tl.constexpr(-1e38)
# Widest block of the sums of keys; wider features take several programs, each with the logits.
WIDEST = 256

FINISH_WARPS = 4


def weight_factor(dtype: torch.dtype) -> float:
    """What weights exp(s - reference) are stored times: float16 would lose small ones."""
    return 2.0**14 if dtype is torch.float16 else 1.0


@triton.jit(do_not_specialize=["B", "Q"])
def keys_kernel(
    query_ptr, batch_ptr, queue_ptr, ids_ptr, queue_ids_ptr, length_ptr, temperature_ptr,
    reference_ptr, sum_ptr, keys_ptr, B, D, stride_query, stride_batch, stride_queue,
    SLICES: tl.constexpr, POSITIVES: tl.constexpr, FACTOR: tl.constexpr, ONE_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One slice of the keys for one block of rows: reference, sum [SLICES, B], keys [SLICES, B, D].

    Weights are exp(s - reference) * FACTOR or, for POSITIVES, 1 where the ids are equal; the row's
    own pair weighs 0. Slice 0 is the batch.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    slice_ = tl.program_id(1)
    column = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    depth = tl.arange(0, BLOCK_K)
    if slice_ == 0:
        key_ptr, key_ids_ptr, stride_key = batch_ptr, ids_ptr, tl.cast(stride_batch, tl.int64)
        begin, end = B * 0, B
    else:
        key_ptr, key_ids_ptr, stride_key = queue_ptr, queue_ids_ptr, tl.cast(stride_queue, tl.int64)
        length = tl.load(length_ptr).to(tl.int32)
        step = tl.cdiv(tl.cdiv(length, SLICES - 1), BLOCK_N) * BLOCK_N
        begin = tl.minimum((slice_ - 1) * step, length)
        end = tl.minimum(begin + step, length)

    inverse = 1.0 / tl.load(temperature_ptr)
    reference = tl.full((BLOCK_M,), NOTHING_SEEN, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    keys = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if ONE_BLOCK and not POSITIVES:
        query = load_rows(query_ptr, row, B - 1, stride_query, column, D, EVEN_D, UPCAST)
    if POSITIVES:
        row_id = tl.load(ids_ptr + tl.minimum(row, B - 1))
    for start in range(begin, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        k = load_rows(key_ptr, key, end - 1, stride_key, column, D, EVEN_D, UPCAST)
        counts = (key < end)[None, :] & ((slice_ > 0) | (key[None, :] != row[:, None]))
        if POSITIVES:
            key_id = tl.load(key_ids_ptr + tl.minimum(key, end - 1))
            weight = tl.where(counts & (key_id[None, :] == row_id[:, None]), 1.0, 0.0)
            total += tl.sum(weight, 1)
        else:
            if ONE_BLOCK:
                s = tl.dot(query, tl.trans(k), input_precision=PRECISION)
            else:
                s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                for at in range(0, D, BLOCK_K):
                    q_part = load_rows(
                        query_ptr, row, B - 1, stride_query, at + depth, D, EVEN_D, UPCAST
                    )
                    k_part = load_rows(
                        key_ptr, key, end - 1, stride_key, at + depth, D, EVEN_D, UPCAST
                    )
                    s = tl.dot(q_part, tl.trans(k_part), s, input_precision=PRECISION)
            s = tl.where(counts, s * inverse, EXCLUDED)
            raised = tl.maximum(reference, tl.max(s, 1))
            change = exp_difference(reference, raised)
            weight = exp_difference(s, raised[:, None])
            total = total * change + tl.sum(weight, 1)
            keys = keys * change[:, None]
            reference = raised
            weight = weight * FACTOR
        keys = tl.dot(weight.to(k.dtype), k, keys, input_precision=PRECISION)

    at = slice_.to(tl.int64) * B + row
    inside = row < B
    tl.store(reference_ptr + at, reference, mask=inside & (tl.program_id(2) == 0))
    tl.store(sum_ptr + at, total, mask=inside & (tl.program_id(2) == 0))
    tl.store(
        keys_ptr + at[:, None] * D + column[None, :], keys,
        mask=inside[:, None] & (column < D)[None, :],
    )  # fmt: skip


@triton.jit
def merge_slices(
    reference_ptr, sum_ptr, keys_ptr, own, own_key, row, column, B, D,
    SLICES: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """(lse - own, weighted mean of the keys other than the own pair's, their weight) of one row."""
    slices = tl.arange(0, triton.next_power_of_2(SLICES))
    at = slices.to(tl.int64) * B + row
    sums = tl.load(sum_ptr + at, mask=slices < SLICES, other=0.0)
    references = tl.load(reference_ptr + at, mask=slices < SLICES, other=NOTHING_SEEN)
    highest = tl.max(references, 0)
    total = tl.sum(sums * exp_difference(references, highest), 0)
    u = highest - own + tl.log(total)  # -inf where there is no other key
    e = tl.exp2(-tl.abs(u) * LOG2E)
    # A comparison and a selection, where a maximum could drop a NaN.
    excess = tl.where(u < 0, 0.0, u) + log1p_unit(e)
    other_share = tl.where(u < 0, e, 1.0) / (1.0 + e)
    weight = tl.where(total == 0, 0.0, other_share / total) / FACTOR
    mean = tl.zeros_like(own_key)
    for slice_ in range(SLICES):
        place = tl.cast(slice_, tl.int64) * B + row
        share = exp_difference(tl.load(reference_ptr + place), highest) * weight
        mean += share * tl.load(keys_ptr + place * D + column, mask=column < D, other=0.0)
    return excess, mean, other_share


@triton.jit(do_not_specialize=["B"])
def finish_kernel(
    student_ptr, teacher_ptr, own_ptr, temperature_ptr, alpha_ptr,
    student_reference_ptr, student_sum_ptr, student_keys_ptr,
    teacher_reference_ptr, teacher_sum_ptr, teacher_keys_ptr, positive_sum_ptr, positive_keys_ptr,
    loss_ptr, gradient_ptr, temperature_gradient_ptr,
    B, D, stride_student, stride_teacher, stride_own, share,
    SLICES: tl.constexpr, TEACHER: tl.constexpr, POSITIVES: tl.constexpr, FACTOR: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One row: its loss, `share` times its gradient [B, D], and the temperature's part of it."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK_D)
    inside = column < D
    wide = row.to(tl.int64)
    student = tl.load(student_ptr + wide * stride_student + column, mask=inside, other=0.0)
    own_key = tl.load(own_ptr + wide * stride_own + column, mask=inside, other=0.0)
    student, own_key = student.to(tl.float32), own_key.to(tl.float32)
    inverse = 1.0 / tl.load(temperature_ptr)
    own = tl.sum(student * own_key, 0) * inverse
    excess, mean, other_share = merge_slices(
        student_reference_ptr, student_sum_ptr, student_keys_ptr, own, own_key, row, column, B, D,
        SLICES, FACTOR,
    )  # fmt: skip
    alpha = 0.0
    taught = tl.zeros_like(own_key)
    taught_share = 0.0
    if TEACHER:
        alpha = tl.load(alpha_ptr)
        teacher = tl.load(teacher_ptr + wide * stride_teacher + column, mask=inside, other=0.0)
        teacher_own = tl.sum(teacher.to(tl.float32) * own_key, 0) * inverse
        _, taught, taught_share = merge_slices(
            teacher_reference_ptr, teacher_sum_ptr, teacher_keys_ptr, teacher_own, own_key, row,
            column, B, D, SLICES, FACTOR,
        )  # fmt: skip
        # Not 0 * NaN: at alpha 0 the teacher has no say, whatever it says.
        taught = tl.where(alpha == 0, 0.0, alpha * taught)
        taught_share = tl.where(alpha == 0, 0.0, alpha * taught_share)
    count = 1.0
    others = tl.zeros_like(own_key)
    if POSITIVES:
        for slice_ in range(SLICES):
            place = tl.cast(slice_, tl.int64) * B + row
            count += tl.load(positive_sum_ptr + place)
            others += tl.load(positive_keys_ptr + place * D + column, mask=inside, other=0.0)
    hard = (1.0 - alpha) / count
    target = taught + hard * others
    target_share = taught_share + hard * (count - 1.0)
    loss = excess - (tl.sum(student * target, 0) * inverse - target_share * own)
    gradient = mean - target + (target_share - other_share) * own_key
    gradient = gradient * (inverse * share)
    tl.store(loss_ptr + row, loss)
    tl.store(temperature_gradient_ptr + row, -tl.sum(student * gradient, 0) * inverse)
    tl.store(
        gradient_ptr + wide * D + column, gradient.to(gradient_ptr.dtype.element_ty), mask=inside
    )


def _block_d(width: int) -> int:
    return max(32, min(WIDEST, triton.next_power_of_2(width)))


def _attend(query, batch, queue, ids, queue_ids, length, temperature, positives, precision):
    """The slices of one kind of rows: reference, sum [SLICES, B], keys [SLICES, B, D]."""
    rows, width = query.shape
    tile, block_d = tile_of(query), _block_d(width)
    like = {"dtype": torch.float32, "device": query.device}
    reference, total = torch.empty(2, SLICES, rows, **like)
    keys = torch.empty(SLICES, rows, width, **like)
    constants = tile_constants(tile, width, query.dtype, precision)
    constants["EVEN_D"] &= width % block_d == 0
    grid = (triton.cdiv(rows, tile.block_m), SLICES, triton.cdiv(width, block_d))
    keys_kernel[grid](
        query, batch, queue, ids, queue_ids, length, temperature, reference, total, keys,
        rows, width, query.stride(0), batch.stride(0), queue.stride(0),
        SLICES=SLICES, POSITIVES=positives, FACTOR=weight_factor(query.dtype),
        ONE_BLOCK=width <= block_d, BLOCK_D=block_d, **constants, **launch_options(tile),
    )  # fmt: skip
    return reference, total, keys


def _direction(
    student, teacher, batch, queue, ids, queue_ids, length, temperature, alpha, teach, precision
):  # fmt: skip
    """(losses [B], gradients [B, D] of their mean over both directions, temperature's [B])."""
    rows, width = student.shape
    keys = (batch, queue, ids, queue_ids, length, temperature)
    with_ids = ids.numel() > 0
    attended = _attend(student, *keys, False, precision)
    taught = _attend(teacher, *keys, False, precision) if teach else attended
    others = _attend(student, *keys, True, precision) if with_ids else attended
    losses, d_temperature = torch.empty(2, rows, dtype=torch.float32, device=student.device)
    # The interpreter truncates where it should round to bf16: there torch rounds.
    coarse = INTERPRETED and student.dtype is torch.bfloat16
    gradient = student.new_empty((rows, width), dtype=torch.float32 if coarse else student.dtype)
    finish_kernel[(rows,)](
        student, teacher, batch, temperature, alpha, *attended, *taught, others[1], others[2],
        losses, gradient, d_temperature, rows, width,
        student.stride(0), teacher.stride(0), batch.stride(0), 0.5 / rows,
        SLICES=SLICES, TEACHER=teach, POSITIVES=with_ids, FACTOR=weight_factor(student.dtype),
        BLOCK_D=triton.next_power_of_2(width), num_warps=FINISH_WARPS, **UNFUSED,
    )  # fmt: skip
    return losses, gradient.to(student.dtype), d_temperature


def momentum_contrastive(
    image: torch.Tensor,
    text: torch.Tensor,
    image_momentum: torch.Tensor,
    text_momentum: torch.Tensor,
    image_queue: torch.Tensor,
    text_queue: torch.Tensor,
    ids: torch.Tensor,
    queue_ids: torch.Tensor,
    queue_length: torch.Tensor,
    temperature: torch.Tensor,
    alpha: torch.Tensor,
    seed: torch.Tensor,
    teacher: bool,
    gradients: bool,
    negatives: bool,
    input_precision: str = "ieee",
) -> tuple[torch.Tensor, ...]:
    """Loss [], gradients w.r.t. image, text [B, D] and temperature [], negatives [B] of both.

    Arguments as in the operator's schema: features of one dtype of float32, bfloat16, float16 with
    unit stride along D; ids [B] and queue_ids [Q] int64 or [0]; queue_length and seed [] int64,
    temperature and alpha [] float32, all on the features' device. The gradients cost nothing
    besides the loss; without `gradients` they come back as [0, D].
    """
    results, sampled = [], []
    with on_device(image):
        for stream, (student, momentum, batch, queue) in enumerate(
            (
                (image, image_momentum, text_momentum, text_queue),
                (text, text_momentum, image_momentum, image_queue),
            )
        ):
            results.append(
                _direction(
                    student, momentum, batch, queue, ids, queue_ids, queue_length, temperature,
                    alpha, teacher, input_precision,
                )
            )  # fmt: skip
            if negatives:
                inputs = student, batch, ids, temperature, seed, stream
                sampled.append(sample_negatives(*inputs, input_precision))
            else:
                sampled.append(seed.new_empty(0))
    (losses, d_image, first), (more, d_text, second) = results
    loss = (losses.mean() + more.mean()) / 2
    if not gradients:
        d_image, d_text = image.new_empty(0, image.shape[1]), text.new_empty(0, text.shape[1])
    return loss, d_image, d_text, first.sum() + second.sum(), *sampled


def aot_cases() -> list[aot.Case]:
    """Every configuration of the two kernels above, for ahead-of-time compilation."""
    attend = AOT_TILED | {"SLICES": SLICES, "POSITIVES": False, "FACTOR": 1.0, "ONE_BLOCK": True,
                      "BLOCK_D": WIDEST}  # fmt: skip
    cases = []
    every = ("bf16", "fp16", "fp32")
    for label, types, constants in (
        ("keys", every, attend),
        ("keys-positives", ("bf16", "fp32"), attend | {"POSITIVES": True}),
        ("keys-wide", ("bf16", "fp32"), attend | {"ONE_BLOCK": False}),
        ("keys-ragged", ("bf16",), attend | {"EVEN_D": False, "BLOCK_D": 128}),
    ):
        cases += aot_kinds(keys_kernel, label, types, constants)
    finish = {"SLICES": SLICES, "TEACHER": True, "POSITIVES": True, "FACTOR": 1.0, "BLOCK_D": 256}
    cases += aot_kinds(
        finish_kernel,
        "finish",
        ("bf16", "fp32"),
        finish,
        warps=FINISH_WARPS,
        tensor_cores=False,
        fusion=False,
    )
    return cases
