"""Triton kernels of word-patch alignment."""

from .gradients import word_patch_alignment_gradients
from .transport import word_patch_alignment

__all__ = ["word_patch_alignment", "word_patch_alignment_gradients"]
