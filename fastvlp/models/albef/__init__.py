"""ALBEF: two towers, a fusion encoder, a momentum encoder, and heads for downstream tasks."""

from .config import CONFIGS, AlbefConfig
from .model import Albef, Losses, MomentumFeatures, Step, create, load, save

__all__ = [
    "Albef",
    "AlbefConfig",
    "CONFIGS",
    "Losses",
    "MomentumFeatures",
    "Step",
    "create",
    "load",
    "save",
]
