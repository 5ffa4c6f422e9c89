"""Triton kernels of the momentum contrastive loss."""

from .losses import momentum_contrastive

__all__ = ["momentum_contrastive"]
