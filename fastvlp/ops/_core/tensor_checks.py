"""Checks of single tensors, for people."""

import torch


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
