"""Layers on the operators: attention, layer norm, and the fusion layer of text and images."""

from .attention import attention, attention_reference
from .dropout import Dropout
from .fusion import FusionLayer, PaddedFusionLayer, load_bert_layer
from .norm import LayerNorm

__all__ = [
    "Dropout",
    "FusionLayer",
    "LayerNorm",
    "PaddedFusionLayer",
    "attention",
    "attention_reference",
    "load_bert_layer",
]
