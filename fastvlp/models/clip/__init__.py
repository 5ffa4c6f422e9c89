"""CLIP: two towers and the contrastive loss."""

from .config import CONFIGS, QUICK, ClipConfig, config_of_name
from .model import Clip, VisionTransformer, create, load, save

__all__ = [
    "CONFIGS",
    "QUICK",
    "Clip",
    "ClipConfig",
    "VisionTransformer",
    "config_of_name",
    "create",
    "load",
    "save",
]
