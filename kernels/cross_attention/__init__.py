"""Triton kernels of cross-attention."""

from .backward import cross_attention_backward
from .forward import cross_attention_forward

__all__ = ["cross_attention_backward", "cross_attention_forward"]
