"""Triton kernels of word-patch alignment."""

from .transport import word_patch_alignment, word_patch_alignment_gradients

__all__ = ["word_patch_alignment", "word_patch_alignment_gradients"]
