"""The contrastive losses: softmax over the global batch (CLIP) and sigmoid (SigLIP)."""

from .api import contrastive, contrastive_reference
from .sigmoid import sigmoid_contrastive, sigmoid_contrastive_reference

__all__ = [
    "contrastive",
    "contrastive_reference",
    "sigmoid_contrastive",
    "sigmoid_contrastive_reference",
]
