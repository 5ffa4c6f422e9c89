"""What one pretraining step of ALBEF is given, checked, and where its tokens lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastvlp.models.albef.config import AlbefConfig
from fastvlp.models.layers.bert import check_range
from fastvlp.ops.packing import PairLayout, TextLayout
from fastvlp.ops.packing.rows import to_device

IGNORED = -100  # the label of tokens that are not masked


@dataclass(frozen=True, eq=False)
class Batch:
    """A checked batch of B pairs.

    Attributes:
        images: [B, 3, size, size]
        ids: [2 B, length], the texts and then the same texts masked.
        mask: bool [B, length], true at tokens.
        labels: [B, length], `IGNORED` where there is nothing to predict.
        both: the layout of `ids`.
        masked: the layout of the masked texts alone.
        labelled: int64 [M] on the host, which packed rows of the masked texts have a label.
        packed_labels: int64 [M], their labels.
        alpha: weight of the teacher.
        pair_ids: int64 [B], equal for pairs that match one another, or None.
    """

    images: Tensor
    ids: Tensor
    mask: Tensor
    labels: Tensor
    both: TextLayout
    masked: TextLayout
    labelled: Tensor
    packed_labels: Tensor
    alpha: float | Tensor
    pair_ids: Tensor | None

    def __len__(self) -> int:
        return len(self.images)


def text_mask(ids: Tensor, mask: Tensor | list[int], what: str = "text") -> Tensor:
    """The mask on the host, from one or from the texts' lengths; it may wait for the device.

    what: the texts' name in messages.

    Raises:
        ValueError: it does not fit `ids`, or a text lacks its first token.
    """
    found = torch.as_tensor(mask).detach().cpu()
    if found.dim() == 1:
        found = torch.arange(ids.shape[1]) < found[:, None]
    if found.shape != ids.shape:
        raise ValueError(
            f"{what}_mask: expected {tuple(ids.shape)} like {what}_ids, or {len(ids)} lengths; "
            f"got {tuple(found.shape)}"
        )
    found = found.bool()
    if not found[:, 0].all():
        raise ValueError(f"{what}_mask: expected the first token, [CLS], in every text")
    return found


def check_ids(name: str, ids: Tensor, config: AlbefConfig) -> None:
    """Raises TypeError or ValueError unless these are token ids [n, length] the model knows."""
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected int64 or int32, got {getattr(ids, 'dtype', type(ids))}")
    if ids.dim() != 2 or not 1 <= ids.shape[1] <= config.text_positions:
        raise ValueError(
            f"{name}: expected [n, length], length 1 to {config.text_positions}, got "
            f"{tuple(ids.shape)}"
        )
    check_range(name, ids, config.vocab_size)


def prepare(
    config: AlbefConfig,
    images: Tensor,
    text_ids: Tensor,
    text_mask_: Tensor | list[int],
    masked_ids: Tensor,
    labels: Tensor,
    alpha: Tensor | float,
    pair_ids: Tensor | None,
) -> Batch:
    """Checks everything that a step takes, so that nothing fails after state was written."""
    count = len(images)
    for name, ids in (("text_ids", text_ids), ("masked_ids", masked_ids)):
        check_ids(name, ids, config)
    for name, t in (("masked_ids", masked_ids), ("labels", labels)):
        if t.shape != text_ids.shape:
            raise ValueError(
                f"{name}: expected {tuple(text_ids.shape)} like text_ids, got {tuple(t.shape)}"
            )
    if len(text_ids) != count:
        raise ValueError(
            f"text_ids: expected one text for each of {count} images, got {len(text_ids)}"
        )
    device = images.device
    mask = text_mask(text_ids, text_mask_)
    on_host = labels.detach().cpu()
    has_label = on_host != IGNORED
    if (has_label & ~mask).any():
        raise ValueError(f"labels: expected {IGNORED} where text_mask has no token")
    check_range("labels", on_host[has_label], config.vocab_size)
    _check_scalars(config, alpha, pair_ids, count)
    return Batch(
        images,
        torch.cat([text_ids, masked_ids]).to(device),
        to_device(mask, device),
        labels.to(device).long(),
        TextLayout.from_mask(torch.cat([mask, mask]), device),
        TextLayout.from_mask(mask, device),
        has_label[mask].nonzero()[:, 0],
        to_device(on_host[has_label].long(), device),
        alpha,
        pair_ids,
    )


def _check_scalars(config, alpha, pair_ids, count) -> None:
    if not isinstance(alpha, Tensor) and not 0 <= alpha <= 1:
        raise ValueError(f"alpha: expected 0 to 1, got {alpha!r}")
    if (pair_ids is None) == config.queue_ids:
        expected = "ids of the pairs" if config.queue_ids else "None"
        raise ValueError(f"ids: expected {expected}, as queue_ids={config.queue_ids} says")
    if pair_ids is None:
        return
    if pair_ids.dtype != torch.int64 or pair_ids.shape != (count,):
        raise ValueError(
            f"ids: expected int64 [{count}], got {pair_ids.dtype} {tuple(pair_ids.shape)}"
        )


class Teacher(NamedTuple):
    """What the momentum encoder computes of a batch."""

    image: Tensor  # [B, embed_dim], unit rows
    text: Tensor
    # Packed labelled rows before the vocabulary; in the plain form all logits, padded.
    words: Tensor


@dataclass(frozen=True, eq=False)
class Matches:
    """The pairs of image-text matching, by their numbers in the batch: matching ones first.

    Attributes:
        text, image: on the host, int64 [pairs].
        labels: int64 [pairs] on the device, 1 where they match.
    """

    text: Tensor
    image: Tensor
    labels: Tensor

    @classmethod
    def make(cls, negative_texts: Tensor, negative_images: Tensor) -> Matches:
        """B positives, then texts with their negative images, then images with negative texts.

        A row without an admissible negative (-1) has none. The negatives decide where tokens lie,
        so the host waits for them: once in a step.
        """
        device = negative_texts.device
        texts, images = torch.stack([negative_texts, negative_images]).cpu()
        own = torch.arange(len(texts))
        text = torch.cat([own, own[images >= 0], texts[texts >= 0]])
        image = torch.cat([own, images[images >= 0], own[texts >= 0]])
        labels = (torch.arange(len(text)) < len(own)).long()
        return cls(text, image, to_device(labels, device))

    def layout(self, batch: Batch) -> tuple[PairLayout, Tensor]:
        """These pairs and, after them, each masked text with its own image, grouped by image.

        And the rows that the objectives read: the first of each of these pairs, then the labelled
        ones.
        """
        count, matches = len(batch), len(self.text)
        own = torch.arange(count)
        pairs = PairLayout.make(
            batch.both, torch.cat([self.text, count + own]), torch.cat([self.image, own]), count
        )
        words = pairs.rows(matches + own)[batch.labelled]
        return pairs, torch.cat([pairs.starts[:matches], words])
