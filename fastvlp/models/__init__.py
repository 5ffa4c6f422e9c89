"""Thin models on top of the kernels.

Import the one you need: ``from fastvlp.models import clip``. `save` and `load` serve all of them.
"""

from .base import load, save

__all__ = ["load", "save"]
