"""Matmuls in float32 and bfloat16."""

from .api import matmul, matmul_reference

__all__ = ["matmul", "matmul_reference"]
