"""The operators: one public function each, its reference beside it, and `explain`."""

from ._dispatch import explain
from ._workspace import release_workspace
from .contrastive import contrastive, contrastive_reference
from .sigmoid_contrastive import sigmoid_contrastive, sigmoid_contrastive_reference
from .soft_cross_entropy import (
    select_rows,
    soft_cross_entropy,
    soft_cross_entropy_reference,
)

__all__ = [
    "contrastive",
    "contrastive_reference",
    "explain",
    "release_workspace",
    "sigmoid_contrastive",
    "sigmoid_contrastive_reference",
    "select_rows",
    "soft_cross_entropy",
    "soft_cross_entropy_reference",
]
