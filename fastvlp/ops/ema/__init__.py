"""Momentum (EMA) update of a list of tensors, alone and within an AdamW step."""

from .adamw import adamw_ema, adamw_ema_reference
from .api import ema, ema_reference
from .multi_tensor import last_exceeding

__all__ = ["adamw_ema", "adamw_ema_reference", "ema", "ema_reference", "last_exceeding"]
