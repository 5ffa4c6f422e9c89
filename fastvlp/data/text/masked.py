"""Masked captions in one call, for a loader: tokens, masked tokens and labels.

``mask_tokens`` and ``sample_keys`` are those of ``fastvlp.masking``, where the rules are written.
Models that mask on the device use them directly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from fastvlp.data.text.bert import BertTokenizer
from fastvlp.masking import IGNORED, MaskingVocabulary, mask_tokens, sample_keys

__all__ = [
    "IGNORED",
    "MaskedText",
    "MaskingTokenizer",
    "MaskingVocabulary",
    "mask_tokens",
    "sample_keys",
]


@dataclass(frozen=True, eq=False)
class MaskedText:
    """A padded batch with its masked form, all [n, length].

    Attributes:
        ids: int64, unmasked.
        mask: bool, true at tokens, false at padding.
        masked_ids: int64.
        labels: int64, the old ids of the chosen tokens, -100 elsewhere.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    masked_ids: torch.Tensor
    labels: torch.Tensor

    def __getitem__(self, rows: slice) -> MaskedText:
        return MaskedText(self.ids[rows], self.mask[rows], self.masked_ids[rows], self.labels[rows])


class MaskingTokenizer:
    """A tokenizer that masks too: called with captions and the key of each.

    Args:
        tokenizer: a BertTokenizer.
        rate, whole_word, budget: of ``fastvlp.masking.mask_tokens``. The defaults are ALBEF's;
            ViLT takes whole words.
    """

    # Tells a loader to give keys made from the seed, the epoch and the number of each sample.
    needs_keys = True

    def __init__(
        self,
        tokenizer: BertTokenizer,
        *,
        rate: float = 0.15,
        whole_word: bool = False,
        budget: Literal["real", "padded"] = "real",
    ) -> None:
        if budget == "padded" and tokenizer.padding != "max_length":
            raise ValueError(
                "budget: 'padded' depends on the length of the row, which with "
                "padding='longest' is that of other captions; make the tokenizer with "
                "padding='max_length'"
            )
        self.tokenizer = tokenizer
        self._options = {"rate": rate, "whole_word": whole_word, "budget": budget}

    def __call__(self, captions: Sequence[str], keys: torch.Tensor) -> MaskedText:
        """Encode and mask captions; ``keys`` is int64 [len(captions)], from ``sample_keys``."""
        text = self.tokenizer.padded(captions)
        vocabulary = self.tokenizer.masking_vocabulary
        masked_ids, labels = mask_tokens(text.ids, vocabulary, keys, **self._options)
        return MaskedText(text.ids, text.mask, masked_ids, labels)
