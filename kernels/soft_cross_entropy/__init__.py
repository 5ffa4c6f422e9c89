"""Triton kernels of the soft cross-entropy."""

from .rows import soft_cross_entropy_rows

__all__ = ["soft_cross_entropy_rows"]
