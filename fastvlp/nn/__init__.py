"""Layers on the operators: attention and layer norm."""

from .attention import attention, attention_reference
from .norm import LayerNorm

__all__ = ["LayerNorm", "attention", "attention_reference"]
