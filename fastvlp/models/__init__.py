"""Thin models on top of the kernels: `albef`, `clip`, `vilt`. `save` and `load` serve all of them.

from fastvlp.models import clip
"""

# All models, so that `load` knows the kind of every file.
from . import albef, clip, vilt
from .albef import tasks
from .base import load, save

__all__ = ["albef", "clip", "load", "save", "tasks", "vilt"]
