"""Checks of the operators' arguments, for people."""

import math
import sys
from numbers import Real

import torch


def dtensor_classes() -> tuple[type, ...]:
    """(DTensor,), for isinstance; () where nothing has imported it, so that no value is one.

    Importing it takes as long as importing torch.
    """
    if torch.compiler.is_compiling():
        from torch.distributed.tensor import DTensor

        return (DTensor,)
    module = sys.modules.get("torch.distributed.tensor")
    return () if module is None else (module.DTensor,)


def check_tensor(name: str, value, *, floating: bool | None = True, dims: int | None = None):
    """Raises TypeError or ValueError, naming it, unless `value` is a tensor as described.

    Args:
        name: of the argument.
        value: what came.
        floating: True for a floating-point dtype, False for whole numbers, None for any.
        dims: how many dimensions it must have.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    is_whole = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    if floating is not None and (value.is_floating_point(), is_whole) != (floating, not floating):
        wanted = "a floating-point dtype" if floating else "whole numbers"
        raise TypeError(f"{name}: expected {wanted}, got {value.dtype}")
    if dims is not None and value.dim() != dims:
        raise ValueError(f"{name}: expected {dims} dimensions, got shape {tuple(value.shape)}")


def check_count(name: str, value) -> None:
    """Raises TypeError or ValueError, naming it, unless `value` is a whole number from 0 on."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected a whole number, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{name}: expected at least 0, got {value}")


def local(name: str, value):
    """The values of a DTensor that is whole on every rank; anything that is no DTensor as it is.

    The gradient is taken to be replicated, too. Raises TypeError for a DTensor that is sharded or
    not yet summed: which of its rows make pairs is for the caller to say.
    """
    if not isinstance(value, dtensor_classes()):
        return value
    if not all(placement.is_replicate() for placement in value.placements):
        raise TypeError(
            f"{name}: expected a plain tensor or a replicated DTensor, got a DTensor with "
            f"placements {value.placements}; pass .to_local() of features sharded over the batch "
            "(with group=), or .full_tensor()"
        )
    return value.to_local()


def check_features(image_features: torch.Tensor, text_features: torch.Tensor) -> None:
    """Raises TypeError or ValueError unless both are [N, D] of one dtype and device, D > 0."""
    for name, t in (("image_features", image_features), ("text_features", text_features)):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
        if not t.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point dtype, got {t.dtype}")
        if t.dim() != 2:
            raise ValueError(f"{name}: expected shape [N, D], got {tuple(t.shape)}")
    if image_features.shape != text_features.shape:
        raise ValueError(
            "text_features: expected one row per row of image_features and the same width "
            f"{tuple(image_features.shape)}, got {tuple(text_features.shape)}"
        )
    if image_features.shape[1] == 0:
        raise ValueError(
            "image_features: expected a width of at least 1, got shape "
            f"{tuple(image_features.shape)}"
        )
    check_same_kind("text_features", text_features, "image_features", image_features)


def check_same_kind(name: str, t: torch.Tensor, like_name: str, like: torch.Tensor) -> None:
    """Raises TypeError or ValueError unless `t` has the dtype and the device of `like`."""
    if t.dtype != like.dtype:
        raise TypeError(
            f"{name}: expected the dtype of {like_name}, {like.dtype}, got {t.dtype}; "
            "cast one of them"
        )
    if t.device != like.device:
        raise ValueError(
            f"{name}: expected the device of {like_name}, {like.device}, got {t.device}; "
            "move one of them"
        )


def check_workspace(workspace_bytes: int | None) -> None:
    """Raises ValueError unless it is None or a positive whole number that 64 bits hold."""
    if workspace_bytes is None:
        return
    if not isinstance(workspace_bytes, int) or not 0 < workspace_bytes < 2**63:
        raise ValueError(
            f"workspace_bytes: expected a positive number of bytes or None, got {workspace_bytes!r}"
        )


def as_scalar(name: str, value, like: torch.Tensor, finite: bool = True) -> torch.Tensor:
    """`value` (number or one-element tensor) as a zero-dimensional tensor on the device of `like`.

    float32, or float64 where `like` is. With `finite`, a value on the CPU that is not finite raises
    ValueError; on a GPU looking would stall the stream, so it shows as a loss that is not finite.
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    value = local(name, value)
    if not isinstance(value, torch.Tensor):
        if not isinstance(value, Real):
            raise TypeError(f"{name}: expected a number or a tensor, got {type(value).__name__}")
        value = _filled(_as_float(name, value), dtype, like.device)
    if value.numel() != 1:
        raise ValueError(f"{name}: expected one value, got shape {tuple(value.shape)}")
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point dtype, got {value.dtype}")
    if value.device != like.device:
        raise ValueError(
            f"{name}: expected the features' device, {like.device}, got {value.device}; move it"
        )
    if finite and readable(value) and not math.isfinite(value.item()):
        raise ValueError(
            f"{name}: expected a finite value, got {value.item()}; the training has diverged "
            "or the parameter was never clamped"
        )
    # Not even views of what is so already: for a few rows these calls are much of the time.
    value = value if value.dim() == 0 else value.reshape(())
    return value if value.dtype == dtype else value.to(dtype)


def _filled(number: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    # Filled on the device: a copy from the host would wait for it. Rounded there, too, which makes
    # infinite what float32 cannot hold, and what torch.full would refuse.
    if abs(number) <= torch.finfo(dtype).max:
        return torch.full((), number, dtype=dtype, device=device)
    return torch.full((), number, dtype=torch.float64, device=device).to(dtype)


def readable(t: torch.Tensor) -> bool:
    """Whether looking at a value costs nothing: it would stall a GPU's stream, and a tracer has
    no values."""
    return t.device.type == "cpu" and not torch.compiler.is_compiling()


def check_share(name: str, value: torch.Tensor | float) -> None:
    """Raises ValueError unless a number, or the one value of a readable tensor, is from 0 to 1."""
    if isinstance(value, torch.Tensor):
        if not readable(value):
            return
        value = value.item()
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a value from 0 to 1, got {value}")


def _as_float(name: str, value: Real) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ValueError(
            f"{name}: expected a number in float64's range, got a larger one"
        ) from None
