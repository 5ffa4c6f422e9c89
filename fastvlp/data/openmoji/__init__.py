"""The OpenMoji demonstration data: emoji images with captions."""

from .dataset import OpenMoji, build
from .splits import SPLITS

__all__ = ["SPLITS", "OpenMoji", "build"]
