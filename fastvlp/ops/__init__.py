"""The operators: one public function each, its reference next to it, and `explain`."""

from . import packing
from ._core.dispatch import explain, operators
from ._core.workspace import release_workspace
from .contrastive import contrastive, contrastive_reference
from .contrastive.sigmoid import sigmoid_contrastive, sigmoid_contrastive_reference
from .cross_attention import cross_attention, cross_attention_reference
from .ema import ema, ema_reference
from .ema.adamw import adamw_ema, adamw_ema_reference
from .ema.multi_tensor import last_exceeding
from .matmul import matmul, matmul_reference
from .momentum_contrastive import (
    MomentumContrastive,
    momentum_contrastive,
    momentum_contrastive_reference,
)
from .soft_cross_entropy import (
    select_rows,
    soft_cross_entropy,
    soft_cross_entropy_reference,
)
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
    "cross_attention",
    "cross_attention_reference",
    "explain",
    "MomentumContrastive",
    "momentum_contrastive",
    "momentum_contrastive_reference",
    "operators",
    "packing",
    "release_workspace",
    "sigmoid_contrastive",
    "sigmoid_contrastive_reference",
    "adamw_ema",
    "adamw_ema_reference",
    "ema",
    "ema_reference",
    "last_exceeding",
    "matmul",
    "matmul_reference",
    "select_rows",
    "soft_cross_entropy",
    "soft_cross_entropy_reference",
    "word_patch_alignment",
    "word_patch_alignment_loss",
    "word_patch_alignment_reference",
]
