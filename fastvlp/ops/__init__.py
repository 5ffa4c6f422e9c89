"""The operators: one public function each, its reference beside it, and `explain`."""

from ._dispatch import explain
from ._workspace import release_workspace
from .contrastive import contrastive, contrastive_reference
from .momentum_contrastive import (
    MomentumContrastive,
    momentum_contrastive,
    momentum_contrastive_reference,
)
from .sigmoid_contrastive import sigmoid_contrastive, sigmoid_contrastive_reference

__all__ = [
    "contrastive",
    "contrastive_reference",
    "explain",
    "MomentumContrastive",
    "momentum_contrastive",
    "momentum_contrastive_reference",
    "release_workspace",
    "sigmoid_contrastive",
    "sigmoid_contrastive_reference",
]
