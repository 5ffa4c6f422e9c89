"""Layouts of packed (unpadded) sequences."""

from .layouts import KeptRows, PairLayout, TextLayout

__all__ = ["KeptRows", "PairLayout", "TextLayout"]
