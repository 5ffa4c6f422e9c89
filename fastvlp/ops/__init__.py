"""The operators: one public function each, its reference beside it, and `explain`."""

from ._dispatch import explain
from ._workspace import release_workspace
from .contrastive import contrastive, contrastive_reference
from .sigmoid_contrastive import sigmoid_contrastive, sigmoid_contrastive_reference
from .word_patch_alignment import (
    alignment_padding,
    word_patch_alignment,
    word_patch_alignment_loss,
    word_patch_alignment_reference,
)

__all__ = [
    "alignment_padding",
    "contrastive",
    "contrastive_reference",
    "explain",
    "release_workspace",
    "sigmoid_contrastive",
    "sigmoid_contrastive_reference",
    "word_patch_alignment",
    "word_patch_alignment_loss",
    "word_patch_alignment_reference",
]
