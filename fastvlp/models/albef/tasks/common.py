"""What ALBEF's fine-tuned models share: their settings, their texts, and the fused towers.

Li et al., arXiv 2107.07651, section 5. A fine-tuned model encodes and fuses as in pretraining, with
packed texts grouped by image, and has a head of its own on the fused tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastvlp.models import base
from fastvlp.models.albef.config import CONFIGS, AlbefConfig
from fastvlp.models.albef.encoder import Towers
from fastvlp.models.albef.pretraining_batch import check_ids, text_mask
from fastvlp.nn import FusionLayer
from fastvlp.ops.packing import PairLayout, TextLayout
from fastvlp.ops.packing.rows import to_device

Config = TypeVar("Config", bound="FinetuningConfig")


@dataclass(frozen=True)
class FinetuningConfig(AlbefConfig):
    """Sizes and settings of a fine-tuned model.

    `pretraining`, `temperature`, `embed_dim` and the queue's fields have no effect where the model
    contrasts nothing.

    Attributes:
        distill: keep a momentum encoder, whose predictions are soft targets beside the labels.
    """

    distill: bool = True

    @classmethod
    def named(cls: type[Config], name: str, **overrides: Any) -> Config:
        """The settings of a key of ``albef.CONFIGS``, with some fields changed.

        Raises:
            ValueError, TypeError: no such size, or no such field.
        """
        if name not in CONFIGS:
            raise base.unknown_name("name", name, list(CONFIGS))
        return cls(**dataclasses.asdict(CONFIGS[name]) | overrides)


class Texts(NamedTuple):
    """Checked texts and where their tokens lie."""

    ids: Tensor  # [n, length]
    mask: Tensor  # bool [n, length], true at tokens
    layout: TextLayout

    @classmethod
    def make(
        cls,
        config: AlbefConfig,
        ids: Tensor,
        mask: Tensor | list[int],
        device: torch.device | str,
        what: str = "text",
    ) -> Texts:
        """Texts on a device, from ids and their mask or lengths; `what` names them in messages.

        Raises:
            TypeError, ValueError: an argument is not as described.
        """
        check_ids(f"{what}_ids", ids, config)
        device = torch.device(device)
        on_host = text_mask(ids, mask, what)
        layout = TextLayout.from_mask(on_host, device)
        return cls(ids.to(device), to_device(on_host, device), layout)


class FusedTowers(Towers):
    """The towers without what only pretraining trains.

    A parameter without a gradient would have DistributedDataParallel wait for it in vain.
    """

    def __init__(self, config: AlbefConfig) -> None:
        super().__init__(config)
        del self.vision_proj, self.text_proj, self.text_encoder.cls

    def encode_pairs(self, images: Tensor, texts: Texts, reference: bool) -> Tensor:
        """Fused tokens of each text with its own image: packed, or padded in the plain form."""
        if reference:
            return self._fuse_own_padded(images, texts)
        return self._fuse_own(images, texts)

    def encode_first(self, images: Tensor, texts: Texts, reference: bool) -> Tensor:
        """The first fused token of each text with its own image, [n, text_width]."""
        if reference:
            return self._fuse_own_padded(images, texts)[:, 0]
        return self._fuse_own(images, texts, first=True)

    def _fuse_own(self, images: Tensor, texts: Texts, first: bool = False) -> Tensor:
        own = torch.arange(len(texts.ids))
        # Grouped by image is the order that the packed texts have.
        pairs = PairLayout.make(texts.layout, own, own, len(own))
        x = self.encode_text(texts.ids, texts.layout)
        return self.fuse(x, pairs, self.encode_image(images), pairs.starts if first else None)

    def _fuse_own_padded(self, images: Tensor, texts: Texts) -> Tensor:
        x = self.encode_padded(texts.ids, texts.mask)
        return self.fuse_padded(x, texts.mask, self.encode_image(images))


def check_count(images: Tensor, texts: Texts) -> None:
    if len(texts.ids) != len(images):
        raise ValueError(
            f"text_ids: expected one text for each of {len(images)} images, got {len(texts.ids)}"
        )


def fuse_first(
    layers: Sequence[FusionLayer],
    x: Tensor,
    pairs: PairLayout,
    sources: Iterable[Tensor | tuple[Tensor, Tensor]],
) -> Tensor:
    """Packed tokens grouped by image through fusion layers, each with images of its own.

    Returns [pairs, text_width], each pair's first token; the last layer computes no others.

    sources: for each layer image tokens [n, L, vision_width], or its keys and values of them.
    """
    keep = pairs.keep(pairs.starts)
    for layer, images in zip(layers, sources, strict=True):
        x = layer(
            x,
            pairs.cu_seqlens_pairs,
            images,
            pairs.cu_seqlens_images,
            max_seqlen_pairs=pairs.max_seqlen_pairs,
            max_seqlen_images=pairs.max_seqlen_images,
            keep=keep if layer is layers[-1] else None,
        )
    return keep.restore(x)


def check_evaluating(model: torch.nn.Module) -> None:
    if model.training:
        raise RuntimeError("model: expected evaluation mode, without dropout; call model.eval()")


def check_alpha(alpha: Tensor | float) -> None:
    if not isinstance(alpha, Tensor) and not 0 <= alpha <= 1:
        raise ValueError(f"alpha: expected 0 to 1, got {alpha!r}")


def runs(tokens: Tensor, most: int) -> Iterator[slice]:
    """Runs of items that together have at most so many tokens, one item at least.

    tokens: of each item, int64 on the host.
    """
    begin = total = 0
    for i, count in enumerate(tokens.tolist()):
        if i > begin and total + count > most:
            yield slice(begin, i)
            begin, total = i, 0
        total += count
    yield slice(begin, len(tokens))
