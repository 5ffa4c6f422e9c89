"""The pass of soft cross entropy over rows of logits: losses, and derivatives w.r.t. the logits.

With p = softmax(z + b), p' = softmax(z' + b') and the label y, a row's loss is
    (1 - alpha) * -log p_y - alpha * sum_j p'_j log p_j
and its derivative w.r.t. the logits p - alpha p' - (1 - alpha) [j = y]. The GEMMs that make the
logits and take the derivatives further are the vendor's: a chunk of rows lies in memory between
them, and this kernel reads it twice, once for the statistics and once, out of the L2 cache,
for the derivatives.

Range: derivatives lie within [-1, 1]. In float16 they are stored times 2**14, so that a
probability of 4e-9 is still a normal number.
"""

import torch
import triton
import triton.language as tl

from .._core import aot
from .._core.launch import CAPABILITIES, INTERPRETED, launch, on_device
from .._core.support import storage_factor
from .._core.tiles import exp_difference

# Columns at a time, and warps. A test with a few dozen columns crosses several blocks.
BLOCK, WARPS = (32, 1) if INTERPRETED else (2048, 8)


@triton.jit
def is_held(col, V, PADDED: tl.constexpr):
    """Which columns a row has room for.

    PADDED rows go on to a multiple of 4: a mask that ended at V, which may lie anywhere, would have
    every element loaded and stored by itself.
    """
    return col < (tl.cdiv(V, 4) * 4 if PADDED else V)


@triton.jit
def load_logits(
    ptr, bias_ptr, row, col, V, stride, BIAS: tl.constexpr, PADDED: tl.constexpr
):  # fmt: skip
    """Logits of some columns of a row; -infinity past the end."""
    inside = col < V
    z = tl.load(ptr + row * stride + col, mask=is_held(col, V, PADDED), other=0.0)
    if BIAS:
        z += tl.load(bias_ptr + col, mask=inside, other=0.0)
    return tl.where(inside, z, -float("inf"))


@triton.jit
def rows_kernel(
    z_ptr, bias_ptr, t_ptr, t_bias_ptr, label_ptr, alpha_ptr, loss_ptr, g_ptr,
    V, stride_z, stride_t, stride_g, ignore_index,
    BIAS: tl.constexpr, TEACHER: tl.constexpr, TEACHER_BIAS: tl.constexpr,
    STORE: tl.constexpr, PADDED: tl.constexpr, FACTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: its loss, and if STORE its derivatives times FACTOR, which may replace z."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(label_ptr + row)
    lane = tl.arange(0, BLOCK)
    if label == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        if STORE:
            zero = tl.zeros((BLOCK,), g_ptr.dtype.element_ty)
            for start in range(0, V, BLOCK):
                col = start + lane
                tl.store(g_ptr + row * stride_g + col, zero, mask=is_held(col, V, PADDED))
    else:
        # Running maxima m (finite: -infinity minus itself is no number), sums s relative to them,
        # and d = sum_j exp(t_j - m_t) (z_j - m_z).
        m_z, s_z, m_t, s_t, d = -3.0e38, 0.0, -3.0e38, 0.0, 0.0
        for start in range(0, V, BLOCK):
            col = start + lane
            z = load_logits(z_ptr, bias_ptr, row, col, V, stride_z, BIAS, PADDED)
            new = tl.maximum(m_z, tl.max(z, 0))
            x = z - new
            s_z = s_z * exp_difference(m_z, new) + tl.sum(exp_difference(z, new), 0)
            if TEACHER:
                t = load_logits(t_ptr, t_bias_ptr, row, col, V, stride_t, TEACHER_BIAS, PADDED)
                new_t = tl.maximum(m_t, tl.max(t, 0))
                p = exp_difference(t, new_t)
                shrink = exp_difference(m_t, new_t)
                # A token that the teacher rules out may be impossible for the student.
                here = tl.sum(tl.where(p == 0.0, 0.0, p * x), 0)
                d = (d + s_t * (m_z - new)) * shrink + here
                s_t = s_t * shrink + tl.sum(p, 0)
                m_t = new_t
            m_z = new

        valid = (label >= 0) & (label < V)
        hard = 1.0
        positive = tl.load(z_ptr + row * stride_z + label, mask=valid, other=0.0)
        positive = tl.where(valid, positive, float("nan"))
        if BIAS:
            positive += tl.load(bias_ptr + label, mask=valid, other=0.0)
        if TEACHER:
            alpha = tl.load(alpha_ptr)
            hard -= alpha
        loss = tl.log(s_z) + hard * (m_z - positive)
        if TEACHER:
            loss -= alpha * (d / s_t)
        tl.store(loss_ptr + row, loss)

        if STORE:
            # Derivatives may replace the logits: every warp has read the label's logit by now.
            tl.debug_barrier()
            own = tl.where(valid, 1.0 / s_z, float("nan"))
            for start in range(0, V, BLOCK):
                col = start + lane
                z = load_logits(z_ptr, bias_ptr, row, col, V, stride_z, BIAS, PADDED)
                g = exp_difference(z, m_z) * own
                if TEACHER:
                    t = load_logits(t_ptr, t_bias_ptr, row, col, V, stride_t, TEACHER_BIAS, PADDED)
                    g -= exp_difference(t, m_t) * (alpha / s_t)
                g = tl.where(col == label, g - hard, g) * FACTOR
                g = tl.where(col < V, g, 0.0)  # not NaN with a bad label
                at = g_ptr + row * stride_g + col
                tl.store(at, g.to(g_ptr.dtype.element_ty), mask=is_held(col, V, PADDED))


def soft_cross_entropy_rows(
    logits: torch.Tensor,
    bias: torch.Tensor,
    teacher: torch.Tensor,
    teacher_bias: torch.Tensor,
    labels: torch.Tensor,
    alpha: torch.Tensor,
    ignore_index: int,
    losses: torch.Tensor,
    gradient: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses of rows of logits, and where wanted their derivatives w.r.t. the logits.

    logits [M, V] float32, unit stride along V, bias [V] float32 not yet added or [0] for none;
    teacher and teacher_bias likewise, or of no elements; labels [M] int64; alpha a float32 tensor
    of one element. Writes and returns losses [M] float32 (0 where the label is ignore_index, NaN
    where it is out of range) and gradient [M, V] in float32, bfloat16 or float16 (times
    `storage_factor`), which may be the logits themselves, or of no elements where not wanted.
    Raises ValueError for other inputs.
    """
    floats = {"logits": logits, "bias": bias, "teacher": teacher, "teacher_bias": teacher_bias,
              "alpha": alpha, "losses": losses}  # fmt: skip
    for name, t in floats.items():
        if t.dtype is not torch.float32:
            raise ValueError(f"{name} must be float32, got {t.dtype}")
    for name, t in (("logits", logits), ("teacher", teacher), ("gradient", gradient)):
        if t.numel() and (t.shape != logits.shape or t.shape[1] > 1 and t.stride(1) != 1):
            raise ValueError(
                f"{name} must be {tuple(logits.shape)} with unit stride along its last axis, got "
                f"{tuple(t.shape)} with strides {t.stride()}"
            )
    rows, cols = logits.shape
    if rows == 0:
        return losses, gradient
    with on_device(logits):
        launch(
            rows_kernel, rows,
            {"z_ptr": logits, "bias_ptr": bias, "t_ptr": teacher, "t_bias_ptr": teacher_bias,
             "label_ptr": labels, "alpha_ptr": alpha, "loss_ptr": losses, "g_ptr": gradient},
            {"V": cols, "stride_z": logits.stride(0), "stride_t": teacher.stride(0),
             "stride_g": gradient.stride(0), "ignore_index": ignore_index},
            {"BIAS": bias.numel() > 0, "TEACHER": teacher.numel() > 0,
             "TEACHER_BIAS": teacher_bias.numel() > 0, "STORE": gradient.numel() > 0,
             "PADDED": _is_padded(logits, teacher, gradient),
             "FACTOR": storage_factor(gradient.dtype), "BLOCK": BLOCK},
            {"num_warps": WARPS, "enable_fp_fusion": True},
        )  # fmt: skip
    return losses, gradient


def _is_padded(*matrices: torch.Tensor) -> bool:
    """Whether every row of these goes on to a multiple of 4 elements."""
    return all(t.stride(0) >= -(-t.shape[1] // 4) * 4 for t in matrices if t.numel())


def aot_cases() -> list[aot.Case]:
    """Every configuration of the pass, for ahead-of-time compilation."""
    flags = ("BIAS", "TEACHER", "TEACHER_BIAS", "STORE")
    kinds = {
        "teacher": (True, True, True, True),
        "labels": (True, False, False, True),
        "no-bias": (False, True, False, True),
        "loss": (True, True, True, False),
    }
    cases = []
    for capability in CAPABILITIES:
        for label, values in kinds.items():
            for kind in ("bf16", "fp16", "fp32") if label == "teacher" else ("bf16",):
                floats = ("z", "bias", "t", "t_bias", "alpha", "loss")
                cases.append(
                    aot.Case(
                        name=f"soft_cross_entropy-{label} {kind}",
                        kernel=rows_kernel,
                        signature={
                            **{f"{name}_ptr": "*fp32" for name in floats},
                            "label_ptr": "*i64", "g_ptr": f"*{kind}", "V": "i32",
                            "stride_z": "i32", "stride_t": "i32", "stride_g": "i32",
                            "ignore_index": "i32",
                        },
                        constants={
                            **dict(zip(flags, values, strict=True)),
                            "PADDED": True, "FACTOR": 1.0, "BLOCK": BLOCK,
                        },
                        capability=capability,
                        warps=WARPS,
                        stages=3,
                        aligned=("stride_z", "stride_t", "stride_g"),
                    )
                )  # fmt: skip
    return cases
