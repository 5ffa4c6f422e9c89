"""Checks of the arguments of soft cross entropy, for people, and the backends that take them."""

from numbers import Real
from typing import Any

import torch

from ...kernels import device_reasons
from .._core import backends
from .._core.checks import check_share, dtensor_classes

_MIXED = "its dtype, or float32 with a half precision one"


def check_head(prefix: str, hidden, weight, bias, vocabulary: int | None = None) -> None:
    """Raises TypeError or ValueError unless hidden [.., D], weight [V, D], bias [V] fit."""
    names = [f"{prefix}{name}" for name in ("hidden", "weight", "bias")]
    for name, t in zip(names, (hidden, weight, bias), strict=True):
        if t is None and name == names[2]:
            continue
        _check_tensor(name, t)
        if t.device != hidden.device:
            raise ValueError(
                f"{name}: expected the device of {names[0]}, {hidden.device}, got {t.device}; "
                "move one of them"
            )
    if hidden.dim() < 1 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{names[1]}: expected [V, D] with the width of {names[0]} {tuple(hidden.shape)}, got "
            f"{tuple(weight.shape)}"
        )
    if weight.shape[0] == 0 or weight.shape[1] == 0:
        raise ValueError(f"{names[1]}: expected V and D of at least 1, got {tuple(weight.shape)}")
    if vocabulary is not None and weight.shape[0] != vocabulary:
        raise ValueError(
            f"{names[1]}: expected the vocabulary of weight, {vocabulary}, got {weight.shape[0]}"
        )
    if weight.dtype != hidden.dtype and not (
        weight.dtype == torch.float32 and hidden.dtype.itemsize < 4
    ):
        raise TypeError(
            f"{names[1]}: expected the dtype of {names[0]}, {hidden.dtype} ({_MIXED}), got "
            f"{weight.dtype}; cast one of them"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{names[2]}: expected shape {tuple(weight.shape[:1])}, got {tuple(bias.shape)}"
        )


def _check_tensor(name: str, t) -> None:
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
    if isinstance(t, dtensor_classes()):
        raise TypeError(
            f"{name}: expected a plain tensor, got a DTensor with placements {t.placements}; pass "
            ".full_tensor(), or .to_local() of hidden states sharded over rows"
        )
    if not t.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point dtype, got {t.dtype}")


def check_labels_tensor(labels, hidden: torch.Tensor) -> None:
    """Raises unless labels are integers, one per row of hidden, on its device."""
    if not isinstance(labels, torch.Tensor):
        raise TypeError(f"labels: expected a torch.Tensor, got {type(labels).__name__}")
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels: expected int64 or int32, got {labels.dtype}")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels: expected shape {tuple(hidden.shape[:-1])}, one per row of hidden, got "
            f"{tuple(labels.shape)}"
        )
    if labels.device != hidden.device:
        raise ValueError(
            f"labels: expected the device of hidden, {hidden.device}, got {labels.device}; move it"
        )


def are_words(labels: torch.Tensor, cols: int) -> bool:
    """Whether all labels, at least one on a CPU, are from 0 to `cols` - 1."""
    low, high = torch.aminmax(labels)
    return low.item() >= 0 and high.item() < cols


def check_labels(labels: torch.Tensor, cols: int, ignore_index: int) -> None:
    """Raises ValueError naming the first bad label; on a GPU its loss becomes NaN instead."""
    if labels.device.type != "cpu" or not labels.numel() or are_words(labels, cols):
        return
    bad = ((labels < 0) | (labels >= cols)) & (labels != ignore_index)
    if bad.any():
        where = bad.nonzero()[0].tolist()
        at = ", ".join(map(str, where))
        raise ValueError(
            f"labels: expected 0 to {cols - 1} or ignore_index {ignore_index}, got "
            f"{labels[tuple(where)].item()} at [{at}]"
        )


def check_teacher(hidden, teacher_hidden, teacher_weight, teacher_bias, alpha, vocabulary) -> None:
    """Raises unless the teacher is whole and fits the student, or is absent with alpha 0."""
    if not isinstance(alpha, torch.Tensor):
        if not isinstance(alpha, Real):
            raise TypeError(f"alpha: expected a number or a tensor, got {type(alpha).__name__}")
    elif alpha.numel() != 1 or alpha.device != hidden.device:
        raise ValueError(
            f"alpha: expected one value on {hidden.device}, got shape {tuple(alpha.shape)} on "
            f"{alpha.device}"
        )
    elif alpha.dtype == torch.bool or alpha.is_complex():
        raise TypeError(f"alpha: expected a floating-point or integer dtype, got {alpha.dtype}")
    check_share("alpha", alpha)
    if teacher_hidden is None:
        if teacher_weight is not None or teacher_bias is not None:
            raise ValueError("teacher_hidden: expected a tensor with teacher_weight, got None")
        if isinstance(alpha, torch.Tensor) or alpha != 0:
            raise ValueError(f"alpha: expected 0 without a teacher, got {alpha}")
        return
    if teacher_weight is None:
        raise ValueError("teacher_weight: expected a tensor with teacher_hidden, got None")
    check_head("teacher_", teacher_hidden, teacher_weight, teacher_bias, vocabulary)
    if teacher_hidden.shape[:-1] != hidden.shape[:-1] or teacher_hidden.device != hidden.device:
        raise ValueError(
            f"teacher_hidden: expected the rows {tuple(hidden.shape[:-1])} of hidden on "
            f"{hidden.device}, got {tuple(teacher_hidden.shape[:-1])} on {teacher_hidden.device}"
        )


def triton_reasons(hidden: torch.Tensor, weight: torch.Tensor, *_, **__) -> list[str]:
    """Why the Triton kernels cannot take this head."""
    return backends.triton_reasons(_supported, hidden)


def _supported(hidden: torch.Tensor) -> list[str]:
    return [*device_reasons(hidden.device), *backends.dtype_reasons(hidden)]


CANDIDATES: dict[str, Any] = {
    "triton": triton_reasons,
    "native": backends.native_reasons,
    "reference": backends.reference_reasons,
}
