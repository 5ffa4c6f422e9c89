"""Packed text: tokens without padding, and (text, image) pairs grouped by their image.

    TextLayout:  packed = padded[mask]            one text after another, the lengths' running sum
    PairLayout:  grouped = the tokens of each pair's text, the pairs of image 0 first, then those of
                 image 1, ...; within an image, pairs in the order of the list

Source: the packed ("variable length") form of attention in Dao et al., "FlashAttention", arXiv
2205.14135; the pairs are those of the fusion encoder of ALBEF, arXiv 2107.07651, section 3.2: for
each image its text, hard negatives and the masked text. Texts of several passes (masked and not)
are one TextLayout: concatenate them along the batch.

`cross_attention` takes grouped tokens and `cu_seqlens_images`, and reads the keys and values of an
image once for all of its pairs; self-attention takes the same tokens and `cu_seqlens_pairs`.

Copying costs one read and one write of the rows, no FLOP but the sum in the gradient of a text that
several pairs use: that goes in a fixed order, in float32, without atomics. All maps are twice
differentiable.

A layout is made on the host, from lengths and pairs that are there: lists or CPU tensors. From
them nothing waits for a GPU, and the indices follow in copies that run on their own. Made from
tensors on a GPU (`TextLayout.from_mask`, `PairLayout` from indices there), it reads them back,
which waits for the device once for each tensor. Using a layout never waits.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import torch

from .._core.checks import check_count, check_tensor
from .rows import RowMap, ranges, row_map, running_sum, to_device


@dataclass(frozen=True, eq=False)
class TextLayout:
    """Where the tokens of a batch of padded texts lie when packed.

    Attributes:
        lengths: tokens of each text, on the host.
        cu_seqlens: int32 [texts + 1], the first packed row of each text, and their number.
        max_seqlen: the longest text.
        pack: [texts, padded length, ...] -> [total, ...]
        unpack: [total, ...] -> [texts, padded length, ...], zeros for padding
        first, last: [total, ...] -> [texts, ...], a text's first or last token (BERT's [CLS],
            CLIP's end of text), zeros for an empty one.

    Examples:
        >>> import torch
        >>> from fastvlp.ops.packing import TextLayout
        >>> texts = TextLayout.from_mask(torch.tensor([[True, True, False], [True, False, False]]))
        >>> packed = texts.pack(torch.tensor([[5, 6, 0], [7, 0, 0]]))
        >>> packed, texts.cu_seqlens
        (tensor([5, 6, 7]), tensor([0, 2, 3], dtype=torch.int32))
        >>> texts.unpack(packed)
        tensor([[5, 6, 0],
                [7, 0, 0]])
    """

    lengths: tuple[int, ...]
    cu_seqlens: torch.Tensor
    max_seqlen: int
    pack: _Pack
    unpack: _Unpack
    first: RowMap
    last: RowMap

    @property
    def total(self) -> int:
        """Tokens of all texts."""
        return sum(self.lengths)

    @classmethod
    def from_lengths(
        cls,
        lengths: Sequence[int] | torch.Tensor,
        padded_length: int,
        device: torch.device | str | None = None,
    ) -> TextLayout:
        """For texts padded at the end. CLIP's, whose causal attention never looks at what follows
        the end of text, have the length (position of the end of text) + 1.

        Args:
            lengths: tokens of each text, 0 to `padded_length`; read back if on a GPU.
            padded_length: the second axis of the padded tensors.
            device: where they are; the CPU, or the device of `lengths`.

        Raises:
            ValueError: a length is out of range.
        """
        check_count("padded_length", padded_length)
        lengths, device = _on_host("lengths", lengths, device)
        if len(lengths) and not 0 <= lengths.min() <= lengths.max() <= padded_length:
            raise ValueError(
                f"lengths: expected 0 to padded_length, {padded_length}; got "
                f"{lengths.min()} to {lengths.max()}"
            )
        return cls._make(torch.arange(padded_length) < lengths[:, None], device)

    @classmethod
    def from_mask(cls, mask: torch.Tensor, device: torch.device | str | None = None) -> TextLayout:
        """For a mask [texts, padded length], true or nonzero at tokens, in any pattern.

        Waits for the device once if the mask is on a GPU. `device` is where the texts are; None
        for the device of the mask.
        """
        check_tensor("mask", mask, floating=None)
        if mask.dim() != 2:
            raise ValueError(f"mask: expected [texts, length], got shape {tuple(mask.shape)}")
        device = mask.device if device is None else torch.device(device)
        return cls._make(mask.detach().cpu().bool(), device)

    @classmethod
    def _make(cls, mask, device):
        lengths = mask.sum(1)
        cu_seqlens = running_sum(lengths)
        where = mask.flatten().nonzero()[:, 0]
        places = torch.full((mask.numel(),), -1)
        places[where] = torch.arange(len(where))
        nonempty = lengths > 0
        first = torch.where(nonempty, cu_seqlens[:-1], -1)
        last = torch.where(nonempty, cu_seqlens[1:] - 1, -1)
        return cls(
            tuple(lengths.tolist()),
            to_device(cu_seqlens.int(), device),
            int(lengths.max()) if len(lengths) else 0,
            _Pack(row_map(where, mask.numel(), device), tuple(mask.shape)),
            _Unpack(row_map(places, len(where), device), tuple(mask.shape)),
            row_map(first, len(where), device),
            row_map(last, len(where), device),
        )


@dataclass(frozen=True, eq=False)
class _Pack:
    rows: RowMap
    shape: tuple[int, int]

    def __call__(self, padded: torch.Tensor) -> torch.Tensor:
        check_tensor("padded", padded, floating=None)
        if padded.dim() < 2 or tuple(padded.shape[:2]) != self.shape:
            raise ValueError(
                f"padded: expected [{self.shape[0]}, {self.shape[1]}, ...], the texts and length "
                f"of this layout, got shape {tuple(padded.shape)}"
            )
        return self.rows(padded.flatten(0, 1))


@dataclass(frozen=True, eq=False)
class _Unpack:
    rows: RowMap
    shape: tuple[int, int]

    def __call__(self, packed: torch.Tensor) -> torch.Tensor:
        return self.rows(packed).unflatten(0, self.shape)


@dataclass(frozen=True, eq=False)
class KeptRows:
    """Some rows of a `PairLayout`, as query rows of its pairs and images.

    Attributes:
        take: [total, ...] -> [rows, ...]
        cu_seqlens_pairs, cu_seqlens_images: int32, the first kept row of each pair and image.
        restore: [rows, ...] in the order of the layout -> in the order they were asked for.
    """

    take: RowMap
    cu_seqlens_pairs: torch.Tensor
    cu_seqlens_images: torch.Tensor
    restore: RowMap


@dataclass(frozen=True, eq=False)
class PairLayout:
    """Where the tokens of (text, image) pairs lie when grouped by image.

    Attributes:
        cu_seqlens_pairs: int32 [pairs + 1], each pair's first row, in grouped order; for
            self-attention.
        cu_seqlens_images: int32 [images + 1], each image's first row; for cross-attention.
        max_seqlen_pairs, max_seqlen_images: the longest pair, the most rows of an image.
        total: rows of all pairs.
        expand: packed texts [text tokens, ...] -> [total, ...]
        first: [total, ...] -> [pairs, ...], each pair's first token in the order of the pair list
            (what image-text matching classifies), zeros for an empty text.

    Examples:
        >>> import torch
        >>> from fastvlp.ops.packing import PairLayout, TextLayout
        >>> texts = TextLayout.from_lengths([2, 1], 2)
        >>> pairs = PairLayout.make(texts, text_index=[0, 1, 1], image_index=[0, 1, 0], images=2)
        >>> pairs.expand(torch.tensor([5, 6, 7])), pairs.cu_seqlens_images
        (tensor([5, 6, 7, 7]), tensor([0, 3, 4], dtype=torch.int32))
    """

    cu_seqlens_pairs: torch.Tensor
    cu_seqlens_images: torch.Tensor
    max_seqlen_pairs: int
    max_seqlen_images: int
    total: int
    expand: RowMap
    first: RowMap
    starts: torch.Tensor
    # On the host, in the order of the pair list.
    _lengths: torch.Tensor

    @classmethod
    def make(
        cls,
        texts: TextLayout,
        text_index: Sequence[int] | torch.Tensor,
        image_index: Sequence[int] | torch.Tensor,
        images: int,
    ) -> PairLayout:
        """Groups the pairs (text_index[p], image_index[p]), in any order.

        Args:
            texts: the packed texts.
            text_index: a text may occur in many pairs, or in none.
            image_index: so may an image.
            images: how many images there are.

        Raises:
            ValueError: the two differ in length, or an index is out of range.
        """
        if not isinstance(texts, TextLayout):
            raise TypeError(f"texts: expected a TextLayout, got {type(texts).__name__}")
        check_count("images", images)
        device = texts.cu_seqlens.device
        text, _ = _on_host("text_index", text_index, device)
        image, _ = _on_host("image_index", image_index, device)
        if len(text) != len(image):
            raise ValueError(
                f"image_index: expected one for each of the {len(text)} of text_index, "
                f"got {len(image)}"
            )
        _check_index("text_index", text, len(texts.lengths), "texts")
        _check_index("image_index", image, images, "images")

        order = image.argsort(stable=True)
        text_lengths = torch.tensor(texts.lengths, dtype=torch.int64)
        lengths = text_lengths[text]
        cu_pairs = running_sum(lengths[order])
        starts = torch.empty_like(lengths)
        starts[order] = cu_pairs[:-1]
        rows_of_images = torch.zeros(images, dtype=torch.int64).index_add_(0, image, lengths)
        text_starts = running_sum(text_lengths)[:-1]
        source = ranges(text_starts[text[order]], lengths[order])
        return cls(
            to_device(cu_pairs.int(), device),
            to_device(running_sum(rows_of_images).int(), device),
            int(lengths.max()) if len(lengths) else 0,
            int(rows_of_images.max()) if images else 0,
            len(source),
            row_map(source, texts.total, device),
            row_map(torch.where(lengths > 0, starts, -1), len(source), device),
            starts,
            lengths,
        )

    def rows(self, pairs: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """Where the tokens of these pairs lie, one pair after another; int64 on the host."""
        numbers, _ = _on_host("pairs", pairs, None)
        _check_index("pairs", numbers, len(self.starts), "pairs")
        return ranges(self.starts[numbers], self._lengths[numbers])

    def keep(self, rows: Sequence[int] | torch.Tensor) -> KeptRows:
        """Some of the rows (whole numbers, none twice), for a layer whose others nobody reads.

        A layer gives them in the order of the layout; `KeptRows.restore` puts them into that of
        `rows`.

        Raises:
            TypeError, ValueError: a row is out of range or occurs twice.
        """
        device = self.cu_seqlens_pairs.device
        rows, _ = _on_host("rows", rows, device)
        _check_index("rows", rows, self.total, "rows")
        ordered, places = rows.sort()
        repeated = (ordered[1:] == ordered[:-1]).nonzero()[:1]
        if len(repeated):
            raise ValueError(
                f"rows: expected each row once, got {ordered[repeated].item()} more than once"
            )
        kept = row_map(ordered, self.total, device)
        back = torch.empty_like(places)
        back[places] = torch.arange(len(rows))
        return KeptRows(
            kept,
            torch.searchsorted(kept.source, self.cu_seqlens_pairs, out_int32=True),
            torch.searchsorted(kept.source, self.cu_seqlens_images, out_int32=True),
            row_map(back, len(rows), device),
        )

    def select(self, pairs: Sequence[int] | torch.Tensor) -> RowMap:
        """[total, ...] -> the tokens of these pairs (numbers in the pair list), one pair after
        another in the order given; for the masked pass the order of the packed texts, so that
        packed labels match."""
        return row_map(self.rows(pairs), self.total, self.cu_seqlens_pairs.device)


def _on_host(name, values, device):
    """The whole numbers as int64 on the host, and the device meant: their own where None."""
    if isinstance(values, torch.Tensor):
        tensor = values
    elif hasattr(values, "__array__"):
        tensor = torch.as_tensor(values)
    elif isinstance(values, Sequence) and all(map(_is_index, values)):
        tensor = torch.tensor(values, dtype=torch.int64)
    else:
        kind = ValueError if isinstance(values, (list, tuple)) else TypeError
        wrong = next((v for v in values if not _is_index(v)), 0) if kind is ValueError else values
        raise kind(
            f"{name}: expected a list of whole numbers or a tensor of them, got "
            f"{reprlib.repr(wrong)} of type {type(wrong).__name__}"
        )
    if tensor.dim() != 1 or tensor.is_floating_point() or tensor.dtype == torch.bool:
        raise ValueError(
            f"{name}: expected a list of whole numbers, got {tensor.dtype} of shape "
            f"{tuple(tensor.shape)}"
        )
    device = tensor.device if device is None else torch.device(device)
    return tensor.detach().cpu().long(), device


def _is_index(value) -> bool:
    is_whole = isinstance(value, Integral) and not isinstance(value, bool)
    return is_whole and -(2**63) <= value < 2**63


def _check_index(name, index, count, what):
    if len(index) and not 0 <= index.min() <= index.max() < count:
        raise ValueError(
            f"{name}: expected 0 to {count - 1}, there are {count} {what}; got "
            f"{index.min()} to {index.max()}"
        )
