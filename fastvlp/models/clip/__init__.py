"""CLIP: two towers and the contrastive loss."""

from .model import CONFIGS, Clip, ClipConfig, VisionTransformer, create, load, save

__all__ = ["CONFIGS", "Clip", "ClipConfig", "VisionTransformer", "create", "load", "save"]
