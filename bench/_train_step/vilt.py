"""ViLT for train_step.py: its model and batch at a size, its losses, and the work of its parts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from _train_step.captions import captions
from _train_step.flops import gflop, transformer
from fastvlp.models import vilt
from fastvlp.models.vilt.patches import ImageBatch

NAME = "vilt"
ATTENTIONS, MOMENTUM = ("SDPA",), False


@dataclass(frozen=True)
class Batch:
    images: Tensor
    false_images: Tensor
    sizes: Tensor  # of both, in patches
    tokens: Tensor
    lengths: Tensor
    masked_tokens: Tensor
    labels: Tensor


def config(size: str) -> vilt.ViltConfig:
    # Without a limit, so that no random subset of patches differs between the forms.
    return dataclasses.replace(vilt.CONFIGS[size], max_image_len=-1)


def build(size: str, momentum_copy: str | None) -> vilt.Vilt:
    torch.manual_seed(0)
    return vilt.Vilt(config(size))


def draw(size: str, batch: int, full: bool) -> Batch:
    """Images of 3:4 and 4:3, two of each three on their side, on the canvas that holds both."""
    c, generator = config(size), torch.Generator().manual_seed(1)
    ids, lengths, masked_ids, labels = captions(
        batch, c.context_length, c.vocab_size, full, generator
    )
    short = c.image_size // c.patch_size
    long = short * 4 // 3
    sizes = torch.tensor([(long, short) if i % 3 == 0 else (short, long) for i in range(batch)])
    side = long * c.patch_size
    images = torch.randn(2, batch, 3, side, side, generator=generator)
    return Batch(images[0], images[1], sizes, ids, lengths, masked_ids, labels)


def attention_layers(model: vilt.Vilt) -> tuple[()]:
    """None: the plain form has one attention only."""
    return ()


def losses(model: vilt.Vilt, batch: Batch, update: bool) -> dict[str, Tensor]:
    found = model.pretraining_losses(
        batch.tokens, batch.lengths, batch.masked_tokens, batch.labels,
        ImageBatch(batch.images, sizes=batch.sizes),
        ImageBatch(batch.false_images, sizes=batch.sizes), seed=3,
    )  # fmt: skip
    return {"total": found.pop("loss"), **found}


def timed_parts(model: vilt.Vilt) -> list[tuple[str, nn.Module, tuple[str, ...]]]:
    return [("images", model, ("embed_images",)), ("stream", model, ("encode",))]


def shape(size: str, batch: Batch) -> dict[str, Any]:
    return {
        "batch": len(batch.tokens),
        "image": batch.images.shape[-1],
        "padded": batch.tokens.shape[1],
        "tokens": int(batch.lengths.sum()),
    }


def work(size: str, batch: Batch, packed: bool) -> dict[str, float]:
    """GFLOP forward of each part, multiplications and additions."""
    c, count, d = config(size), len(batch.tokens), config(size).width
    patches = batch.sizes.prod(1).double()
    if not packed:
        patches = torch.full_like(patches, batch.sizes.max(0).values.prod().item())
    text = batch.lengths.double()
    padded = text if packed else torch.full_like(text, batch.tokens.shape[1])
    labelled = (batch.labels != -100).sum().item() if packed else text.sum().item()
    found = {
        "images": 2 * 2 * patches.sum().item() * 3 * c.patch_size**2 * d,
        "stream": 2 * c.layers * transformer(d, padded + 1 + patches),
        "objectives": labelled * (2 * d**2 + 2 * d * c.vocab_size)
        + 2 * count * d * (text * patches).mean().item(),
    }
    return gflop(found, backward=2 * sum(found.values()))
