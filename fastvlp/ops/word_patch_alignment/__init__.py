"""Word-patch alignment by optimal transport (ViLT, UNITER)."""

from .api import (
    alignment_padding,
    word_patch_alignment,
    word_patch_alignment_loss,
    word_patch_alignment_reference,
)

__all__ = [
    "alignment_padding",
    "word_patch_alignment",
    "word_patch_alignment_loss",
    "word_patch_alignment_reference",
]
