"""Floating point operations of what the models of train_step.py have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def transformer(width: int, lengths: Tensor) -> float:
    """One layer, forward, on sequences of these lengths."""
    return (24 * width**2 * lengths + 4 * width * lengths**2).sum().item()


def image_tower(config: Any, count: int) -> float:
    """Patches and layers, forward, of `count` images and their class tokens."""
    width, patches = config.vision_width, (config.image_size // config.patch_size) ** 2
    tokens = patches + 1
    layer = tokens * (24 * width**2 + 4 * tokens * width)
    return count * (config.vision_layers * layer + 2 * patches * 3 * config.patch_size**2 * width)


def gflop(parts: Mapping[str, float], backward: float) -> dict[str, float]:
    """Each part, and the backward pass of them all, in 10^9 operations."""
    return {name: value / 1e9 for name, value in {**parts, "backward": backward}.items()}
