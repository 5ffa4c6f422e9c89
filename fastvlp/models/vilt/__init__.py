"""ViLT: one transformer over words and image patches."""

from .model import CONFIGS, Vilt, ViltConfig, create, load, save

__all__ = ["CONFIGS", "Vilt", "ViltConfig", "create", "load", "save"]
