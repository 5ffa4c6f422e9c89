"""The operators: one public function each, its reference beside it, and `explain`."""

from ._dispatch import explain
from ._workspace import release_workspace
from .contrastive import contrastive, contrastive_reference
from .cross_attention import cross_attention, cross_attention_reference
from .sigmoid_contrastive import sigmoid_contrastive, sigmoid_contrastive_reference

__all__ = [
    "contrastive",
    "contrastive_reference",
    "cross_attention",
    "cross_attention_reference",
    "explain",
    "release_workspace",
    "sigmoid_contrastive",
    "sigmoid_contrastive_reference",
]
