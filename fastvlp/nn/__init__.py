"""Layers on the operators: attention, layer norm, and the fusion layer of text and images."""

from ..ops.cross_attention.self_attention import attention, attention_reference
from .dropout import Dropout
from .feed_forward import Norm, feed_forward, norm_linear
from .fusion import FusionLayer, PaddedFusionLayer, load_bert_layer
from .linear import Linear, linear
from .norm import LayerNorm

__all__ = [
    "Dropout",
    "FusionLayer",
    "LayerNorm",
    "Linear",
    "Norm",
    "PaddedFusionLayer",
    "attention",
    "attention_reference",
    "feed_forward",
    "linear",
    "load_bert_layer",
    "norm_linear",
]
