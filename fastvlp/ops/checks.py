"""Checks of arguments for the layers above the operators, with the operators' messages."""

from ._core.checks import as_scalar, check_count, check_features, check_tensor

__all__ = ["as_scalar", "check_count", "check_features", "check_tensor"]
