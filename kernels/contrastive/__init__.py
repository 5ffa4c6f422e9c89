"""Triton kernels of the contrastive losses."""

from .backward import contrastive_gradients
from .forward import contrastive_statistics
from .sigmoid import SigmoidContrastive, sigmoid_contrastive

__all__ = [
    "SigmoidContrastive",
    "contrastive_gradients",
    "contrastive_statistics",
    "sigmoid_contrastive",
]
