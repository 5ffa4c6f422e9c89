"""Cross-attention over packed keys, and self-attention."""

from .api import cross_attention, cross_attention_reference
from .self_attention import attention, attention_reference

__all__ = ["attention", "attention_reference", "cross_attention", "cross_attention_reference"]
