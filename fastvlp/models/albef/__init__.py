"""ALBEF: two towers, a fusion encoder, a momentum encoder, and heads for downstream tasks."""

from .config import CONFIGS, AlbefConfig
from .model import Albef, Losses, create, load, save

__all__ = ["Albef", "AlbefConfig", "CONFIGS", "Losses", "create", "load", "save"]
