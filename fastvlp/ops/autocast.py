"""What torch.autocast does to an operator's inputs, for operators that torch does not know."""

from typing import Any

import torch

from .._tracing import constant_result


def as_autocast(*tensors: Any) -> tuple[Any, ...]:
    """Each as torch.autocast would hand it to a matmul: cast to its dtype, inside of one.

    As in torch, float64 stays float64. What is no tensor, or no floating-point one, is returned as
    it is, for the operator's own checks to refuse.
    """
    return tuple(_cast(t) for t in tensors)


def autocasts(device_type: str) -> bool:
    """Whether torch.autocast is on for this type of device."""
    return _has_autocast(device_type) and torch.is_autocast_enabled(device_type)


@constant_result
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def _cast(t):
    if not isinstance(t, torch.Tensor) or not t.is_floating_point() or t.dtype == torch.float64:
        return t
    device = t.device.type
    return t.to(torch.get_autocast_dtype(device)) if autocasts(device) else t
