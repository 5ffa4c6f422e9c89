"""The contrastive loss against a queue of momentum features (MoCo, ALBEF)."""

from .api import MomentumContrastive, momentum_contrastive, momentum_contrastive_reference

__all__ = ["MomentumContrastive", "momentum_contrastive", "momentum_contrastive_reference"]
