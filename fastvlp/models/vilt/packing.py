"""Sequences of ViLT: each text's tokens, then its image's, packed or padded.

A sequence is [text tokens, image class token, patches]. Packed, all sequences lie one after another
in the rows of one matrix; padded, texts and images are each filled up to the longest and a key mask
says what is real. Both are made from lengths on the host, and both give their rows back in the same
form, so that what follows need not know which it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvlp.models.layers.vit import Segments
from fastvlp.ops.packing.rows import ranges, row_map, running_sum, to_device


@dataclass(frozen=True, eq=False)
class ImageTokens:
    """Embedded images, class token first, without their modality embedding.

    Attributes:
        rows: packed [tokens of all images, width], or padded [n, most tokens, width].
        lengths: tokens of each image, on the host.
    """

    rows: Tensor
    lengths: tuple[int, ...]

    def join(self, other: ImageTokens) -> ImageTokens:
        """These images, then the others."""
        rows = (self.rows, other.rows)
        if self.rows.dim() == 3:
            most = max(r.shape[1] for r in rows)
            rows = tuple(F.pad(r, (0, 0, 0, most - r.shape[1])) for r in rows)
        return ImageTokens(torch.cat(rows), self.lengths + other.lengths)


@dataclass(frozen=True, eq=False)
class Sequences:
    """Rows of texts joined with images.

    Attributes:
        rows: [total, width] packed, or [pairs, text_size + most image tokens, width].
        text_lengths, image_lengths: of each pair, on the host.
        text_size: padded length of the texts.
        segments: where the packed sequences lie; None if padded.
        key_mask: bool [pairs, length], what is real; None if packed.
    """

    rows: Tensor
    text_lengths: tuple[int, ...]
    image_lengths: tuple[int, ...]
    text_size: int
    segments: Segments | None = None
    key_mask: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Sequences:
        """The same sequences with a function of each row in its place."""
        return replace(self, rows=function(self.rows))

    def first(self) -> Tensor:
        """[pairs, width], the first token of each text."""
        if self.segments is None:
            return self.rows[:, 0]
        return row_map(running_sum(self._lengths())[:-1], *self._source())(self.rows)

    def text(self) -> Tensor:
        """[pairs, text_size, width], zeros at padding."""
        lengths = torch.tensor(self.text_lengths, dtype=torch.int64)
        return self._part(torch.zeros_like(lengths), lengths, self.text_size, slice(self.text_size))

    def image(self) -> Tensor:
        """[pairs, most image tokens, width], the class token first, zeros at padding."""
        offset = torch.tensor(self.text_lengths, dtype=torch.int64)
        lengths = torch.tensor(self.image_lengths, dtype=torch.int64)
        where = slice(self.text_size, None)
        return self._part(offset, lengths, max(self.image_lengths, default=0), where)

    def packed_text(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The text rows [text tokens, width], and of [pairs, text_size, ..] the same rows."""
        if self.segments is None:
            return self.text().flatten(0, 1), values.flatten(0, 1)
        lengths = torch.tensor(self.text_lengths, dtype=torch.int64)
        count = len(lengths) * self.text_size
        rows = row_map(ranges(running_sum(self._lengths())[:-1], lengths), *self._source())
        padded = ranges(torch.arange(len(lengths)) * self.text_size, lengths)
        return rows(self.rows), row_map(padded, count, values.device)(values.flatten(0, 1))

    def _part(self, offset: Tensor, lengths: Tensor, size: int, where: slice) -> Tensor:
        if self.segments is None:
            return self.rows[:, where].masked_fill(~self.key_mask[:, where, None], 0)
        at = torch.arange(size)
        source = (running_sum(self._lengths())[:-1] + offset)[:, None] + at
        source = torch.where(at < lengths[:, None], source, -1)
        return row_map(source.flatten(), *self._source())(self.rows).unflatten(
            0, (len(lengths), size)
        )

    def _lengths(self) -> Tensor:
        return torch.tensor([self.text_lengths, self.image_lengths], dtype=torch.int64).sum(0)

    def _source(self) -> tuple[int, torch.device]:
        return len(self.rows), self.rows.device


def join_packed(
    text: Tensor,
    text_lengths: tuple[int, ...],
    text_size: int,
    images: ImageTokens,
    image_index: Tensor,
) -> Sequences:
    """Packed sequences of texts [text tokens, width] and the images that `image_index` names."""
    texts = torch.tensor(text_lengths, dtype=torch.int64)
    tokens = torch.tensor(images.lengths, dtype=torch.int64)
    image_starts = running_sum(tokens)[image_index] + int(texts.sum())
    tokens = tokens[image_index]
    # Text and image of each pair by turns.
    begins = torch.stack([running_sum(texts)[:-1], image_starts], 1).flatten()
    source = ranges(begins, torch.stack([texts, tokens], 1).flatten())
    rows = torch.cat([text, images.rows])
    device = rows.device
    lengths = texts + tokens
    longest = int(lengths.max()) if len(lengths) else 0
    segments = Segments(to_device(running_sum(lengths).int(), device), longest)
    joined = row_map(source, len(rows), device)(rows)
    return Sequences(joined, text_lengths, tuple(tokens.tolist()), text_size, segments)


def join_padded(
    text: Tensor, text_lengths: tuple[int, ...], images: ImageTokens, image_index: Tensor
) -> Sequences:
    """The same from texts [pairs, text_size, width], padded."""
    lengths = torch.tensor(images.lengths, dtype=torch.int64)[image_index]
    rows = torch.cat([text, images.rows[to_device(image_index, text.device)]], 1)
    size, most = text.shape[1], images.rows.shape[1]
    real = [
        torch.arange(count) < of[:, None]
        for count, of in ((size, torch.tensor(text_lengths)), (most, lengths))
    ]
    key_mask = to_device(torch.cat(real, 1), text.device)
    return Sequences(rows, text_lengths, tuple(lengths.tolist()), size, key_mask=key_mask)


def first_of_each(first: Tensor, rows: Tensor, counts: tuple[int, ...]) -> Tensor:
    """first[i] and then segment i of the packed rows, for every i."""
    lengths = torch.tensor(counts, dtype=torch.int64)
    n = len(counts)
    begins = torch.stack([torch.arange(n), n + running_sum(lengths)[:-1]], 1).flatten()
    source = ranges(begins, torch.stack([torch.ones_like(lengths), lengths], 1).flatten())
    return row_map(source, n + len(rows), rows.device)(torch.cat([first, rows]))


def lengths_of(tokens: Tensor, text: Sequence[int] | Tensor | None) -> tuple[int, ...]:
    """Tokens of each text on the host, from lengths or a mask (read back if on a GPU).

    Raises:
        ValueError: a text is empty, longer than the padded tokens or not padded at the end.
    """
    if text is None:
        return (tokens.shape[1],) * len(tokens)
    text = torch.as_tensor(text).detach().cpu()
    if text.dim() == 2:
        mask = text.bool()
        if mask.shape != tokens.shape or (mask[:, 1:] > mask[:, :-1]).any():
            raise ValueError(
                f"text: expected a mask {list(tokens.shape)} of texts padded at the end, "
                f"got {list(mask.shape)}"
            )
        text = mask.sum(1)
    if text.shape != (len(tokens),) or (text.is_floating_point() and len(text)):
        raise ValueError(f"text: expected {len(tokens)} lengths, got {list(text.shape)}")
    if len(text) and not 1 <= text.min() <= text.max() <= tokens.shape[1]:
        raise ValueError(f"text: expected lengths 1 to {tokens.shape[1]}, got {text.tolist()}")
    return tuple(text.tolist())
