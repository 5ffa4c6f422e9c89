"""ALBEF for train_step.py: its model and batch at a size, its losses, and the work of its parts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from _train_step.captions import captions
from _train_step.flops import gflop, image_tower, transformer
from fastvlp.models import albef

NAME = "albef"
ATTENTIONS, MOMENTUM = ("eager", "SDPA"), True
ALPHA, PADDED = 0.4, 30
OVERRIDES = {"small": {}, "tiny": {"text_positions": 40}}


@dataclass(frozen=True)
class Batch:
    images: Tensor
    ids: Tensor
    mask: Tensor
    masked_ids: Tensor
    labels: Tensor


def config(size: str, **changes: Any) -> albef.AlbefConfig:
    return dataclasses.replace(albef.CONFIGS[size], **OVERRIDES[size], **changes)


def build(size: str, momentum_copy: str | None) -> albef.Albef:
    torch.manual_seed(0)
    return albef.Albef(config(size, momentum_copy=momentum_copy))


def draw(size: str, batch: int, full: bool) -> Batch:
    """Images and texts of 30 tokens, or of a caption's lengths; 15 % of the tokens masked."""
    sizes, generator = config(size), torch.Generator().manual_seed(1)
    ids, lengths, masked_ids, labels = captions(batch, PADDED, sizes.vocab_size, full, generator)
    side = sizes.image_size
    images = torch.randn(batch, 3, side, side, generator=generator)
    mask = torch.arange(PADDED) < lengths[:, None]
    return Batch(images, ids, mask, masked_ids, labels)


def attention_layers(model: albef.Albef) -> list[nn.Module]:
    """The layers of text and fusion, whose plain form takes either attention."""
    encoders = [side.text_encoder for side in (model.student, model.teacher)]
    return [layer for encoder in encoders for layer in (*encoder.text, *encoder.fusion)]


def losses(model: albef.Albef, batch: Batch, update: bool) -> dict[str, Tensor]:
    found = model.pretraining_loss(
        batch.images, batch.ids, batch.mask, batch.masked_ids, batch.labels, ALPHA, update=update,
        momentum_updated=True, seed=3,
    )  # fmt: skip
    return found._asdict()


def timed_parts(model: albef.Albef) -> list[tuple[str, nn.Module, tuple[str, ...]]]:
    """Names of parts, and the methods whose time is theirs."""
    parts = []
    for name, tower in (("teacher", model.teacher), ("student", model.student)):
        parts += [
            (f"{name}: image", tower, ("encode_image",)),
            (f"{name}: text", tower, ("encode_text", "encode_padded")),
            (f"{name}: fusion", tower, ("fuse", "fuse_padded")),
        ]
    return parts


def work(size: str, batch: Batch, packed: bool) -> dict[str, float]:
    """GFLOP forward of each part, multiplications and additions."""
    c, count = config(size), len(batch.ids)
    keys = (c.image_size // c.patch_size) ** 2 + 1
    v, d = c.vision_width, c.text_width
    lengths = batch.mask.sum(1).double()
    if not packed:
        lengths = torch.full_like(lengths, batch.ids.shape[1])
    text = lengths.sum().item()
    image, layer = image_tower(c, count), transformer(d, lengths)
    cross = 4 * d**2 * text + 4 * d * text * keys
    projections = 4 * v * d * count * keys
    labelled = (batch.labels != -100).sum().item() if packed else text
    head = labelled * (2 * d**2 + 2 * d * c.vocab_size)
    contrast = 8 * count * (count + c.queue_size) * c.embed_dim

    def fusion(passes: int) -> float:
        images = 1 if packed else passes
        return c.fusion_layers * (passes * (layer + cross) + images * projections)

    found = {}
    for name, passes in (("teacher", 1), ("student", 4)):
        found[f"{name}: image"] = image
        found[f"{name}: text"] = 2 * c.text_layers * layer
        found[f"{name}: fusion"] = fusion(passes)
    found["objectives"] = 2 * head + contrast
    trained = sum(value for name, value in found.items() if name.startswith("student"))
    return gflop(found, backward=2 * (trained + head) + contrast)


def shape(size: str, batch: Batch) -> dict[str, int]:
    return {
        "batch": len(batch.ids), "image": config(size).image_size, "padded": batch.ids.shape[1],
        "tokens": int(batch.mask.sum()), "queue": config(size).queue_size,
    }  # fmt: skip
