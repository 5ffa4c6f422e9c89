"""What the CLIP and the BERT tokenizer share: rows of ids between two special ones, as batches."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from fastvlp.data.text.cleaning import cut
from fastvlp.ops.packing import TextLayout

if TYPE_CHECKING:
    import tokenizers


@dataclass(frozen=True, eq=False)
class PaddedText:
    """Ids and a mask, int64 and bool [n, length]; the mask is true at tokens, false at padding."""

    ids: torch.Tensor
    mask: torch.Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PaddedText:
        """The same on ``device``."""
        return PaddedText(
            self.ids.to(device, non_blocking=non_blocking),
            self.mask.to(device, non_blocking=non_blocking),
        )


@dataclass(frozen=True, eq=False)
class PackedText:
    """Ids without padding, int64 [total], and where each text lies in them."""

    ids: torch.Tensor
    layout: TextLayout


class TextTokenizer:
    """Captions to rows ``first tokens [last] padding``.

    Calling it gives int64 ids [n, length]. It may be called from several threads at once.

    Attributes:
        vocab_size: number of ids.
        context_length: the largest number of ids of a caption, special ones included.
        pad_id: id of the padding.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        first_id: int,
        last_id: int | None,
        pad_id: int,
        *,
        vocab_size: int,
        context_length: int,
        padding: Literal["longest", "max_length"],
        truncate: bool,
        clean: Callable[[str], str] | None,
    ) -> None:
        least = 2 + (last_id is not None)
        if context_length < least:
            raise ValueError(f"context_length: expected {least} or more; got {context_length}")
        if padding not in ("longest", "max_length"):
            raise ValueError(f"padding: expected 'longest' or 'max_length'; got {padding!r}")
        self.vocab_size = vocab_size
        self.context_length = context_length
        self.pad_id = pad_id
        self.padding = padding
        self.truncate = truncate
        self._tokenizer = tokenizer
        self._first = [first_id]
        self._last = [] if last_id is None else [last_id]
        # Of an empty caption, and the width of a batch without any.
        self._shortest = len(self._first) + len(self._last)
        self._clean = clean

    def __call__(self, captions: Sequence[str]) -> torch.Tensor:
        """Encode captions to int64 ids [len(captions), length].

        The length is ``context_length``, or with ``padding="longest"`` that of the longest caption.

        Raises:
            TypeError: ``captions`` is a single string or holds something else than strings.
            ValueError: a caption has more than ``context_length`` ids and ``truncate`` is off.

        Of a caption its beginning is encoded, as `cleaning.cut` gives it: 4096 characters, or
        32 for each id of a longer context; a longer one is an error where ``truncate`` is off.
        """
        return self.padded(captions).ids

    def padded(self, captions: Sequence[str]) -> PaddedText:
        """Encode captions to ids and their mask."""
        rows = self.rows(captions)
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        width = self.context_length
        if self.padding == "longest":
            width = int(lengths.max(initial=self._shortest))
        mask = np.arange(width) < lengths[:, None]
        ids = np.full(mask.shape, self.pad_id, np.int64)
        ids[mask] = _flat(rows)
        return PaddedText(torch.from_numpy(ids), torch.from_numpy(mask))

    def packed(
        self, captions: Sequence[str], device: torch.device | str | None = None
    ) -> PackedText:
        """Encode captions to ids without padding; the layout's padded form is that of a call."""
        rows = self.rows(captions)
        lengths = [len(row) for row in rows]
        longest = max(lengths, default=self._shortest)
        width = longest if self.padding == "longest" else self.context_length
        ids = torch.from_numpy(_flat(rows))
        if device is not None:
            ids = ids.to(device)
        return PackedText(ids, TextLayout.from_lengths(lengths, width, device))

    def rows(self, captions: Sequence[str]) -> list[list[int]]:
        """The ids of each caption, special ones included, without padding."""
        if isinstance(captions, str) or not all(isinstance(c, str) for c in captions):
            raise TypeError("captions: expected a list of strings; put a single caption in a list")
        texts = [cut(caption, 0 if self._clean else self.context_length) for caption in captions]
        if not self.truncate:
            self._check_lengths(captions, texts)
        if self._clean is not None:
            texts = [self._clean(text) for text in texts]
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        room = self.context_length - len(self._first) - len(self._last)
        rows = []
        for number, encoding in enumerate(encoded):
            ids = encoding.ids
            if len(ids) > room and not self.truncate:
                has = f"{len(ids) + self.context_length - room}"
                raise self._too_long(number, has, captions[number])
            rows.append(self._first + ids[:room] + self._last)
        return rows

    def _check_lengths(self, captions: Sequence[str], cut_captions: Sequence[str]) -> None:
        for number, (caption, beginning) in enumerate(zip(captions, cut_captions, strict=True)):
            if len(caption) > len(beginning):
                raise self._too_long(number, f"{len(caption)} characters", caption)

    def _too_long(self, number: int, has: str, caption: str) -> ValueError:
        some = repr(caption) if len(caption) <= 1000 else f"{caption[:1000]!r}..."
        return ValueError(
            f"captions: expected at most {self.context_length} ids each, special ones included; "
            f"caption {number} has {has}: {some}; shorten it, or make the tokenizer with "
            f"truncate=True"
        )

    def decode(self, ids: torch.Tensor) -> list[str]:
        """The text of ids [n, length], special tokens and padding left out.

        A row ends at its first end token, or padding where there is none.
        """
        ends = {*self._last} or {self.pad_id}
        texts = []
        for row in ids.tolist():
            row = row[len(self._first) :] if row[:1] == self._first else row
            end = next((place for place, token in enumerate(row) if token in ends), len(row))
            texts.append(self._tokenizer.decode(row[:end], skip_special_tokens=False).strip())
        return texts


def _flat(rows: list[list[int]]) -> np.ndarray:
    return np.fromiter((token for row in rows for token in row), np.int64)


def packaged_file(candidates: dict[str, str], what: str) -> Path:
    """The first file of {module: path inside it} whose package is installed; it is not imported.

    Raises:
        FileNotFoundError: there is none; the message says what to do.
    """
    for module, inside in candidates.items():
        spec = importlib.util.find_spec(module)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            path = Path(folder) / inside
            if path.is_file():
                return path
    raise FileNotFoundError(
        f"source: no package with {what} is installed ({', '.join(candidates)}); "
        f"give the path of the file"
    )
