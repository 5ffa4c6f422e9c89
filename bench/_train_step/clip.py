"""CLIP for train_step.py: its model and batch at a size, its loss, and the work of its parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from _train_step.captions import caption_lengths
from _train_step.flops import gflop, image_tower, transformer
from fastvlp.losses import ClipLoss
from fastvlp.models import clip
from fastvlp.ops import contrastive_reference

NAME = "clip"
ATTENTIONS, MOMENTUM = ("SDPA",), False
NAMES = {"small": "ViT-S/16", "tiny": "tiny"}


@dataclass(frozen=True)
class Batch:
    images: Tensor
    tokens: Tensor


def config(size: str) -> clip.ClipConfig:
    return clip.CONFIGS[NAMES[size]]


def build(size: str, momentum_copy: str | None) -> clip.Clip:
    torch.manual_seed(0)
    return clip.create(NAMES[size])


def draw(size: str, batch: int, full: bool) -> Batch:
    """Images, and texts of the whole context or of a caption's lengths; the end has the last id."""
    c, generator = config(size), torch.Generator().manual_seed(1)
    lengths = caption_lengths(batch, c.context_length, full)
    tokens = torch.randint(1, c.vocab_size - 1, (batch, c.context_length), generator=generator)
    place = torch.arange(c.context_length)
    tokens = torch.where(place < lengths[:, None], tokens, 0)
    tokens[torch.arange(batch), lengths - 1] = c.vocab_size - 1
    return Batch(torch.randn(batch, 3, c.image_size, c.image_size, generator=generator), tokens)


def attention_layers(model: clip.Clip) -> tuple[()]:
    """None: the plain form has one attention only."""
    return ()


def losses(model: clip.Clip, batch: Batch, update: bool) -> dict[str, Tensor]:
    features = model(batch.images, batch.tokens)
    return {"total": (contrastive_reference if model.reference else ClipLoss())(*features)}


def timed_parts(model: clip.Clip) -> list[tuple[str, nn.Module, tuple[str, ...]]]:
    return [("image", model, ("encode_image",)), ("text", model, ("encode_text",))]


def shape(size: str, batch: Batch) -> dict[str, Any]:
    c = config(size)
    return {
        "batch": len(batch.tokens),
        "image": c.image_size,
        "padded": c.context_length,
        "tokens": int((batch.tokens.argmax(1) + 1).sum()),
    }


def work(size: str, batch: Batch, packed: bool) -> dict[str, float]:
    """GFLOP forward of each part, multiplications and additions."""
    c, count = config(size), len(batch.tokens)
    lengths = (batch.tokens.argmax(1) + 1).double()
    if not packed:
        lengths = torch.full_like(lengths, c.context_length)
    found = {
        "image": image_tower(c, count),
        "text": c.text_layers * transformer(c.text_width, lengths),
        "objectives": (1 if packed else 2) * 2 * count**2 * c.embed_dim,
    }
    return gflop(found, backward=2 * sum(found.values()))
