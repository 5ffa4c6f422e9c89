"""Tokenizers trained on the captions at hand.

For small vocabularies, where a tokenizer of 49,408 entries would spend most of a text tower on
words that never occur. Ids keep CLIP's convention that the end-of-text id is the largest, so that a
text tower can pool at ``ids.argmax(-1)`` (Radford et al. 2021, section 2.4).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from fastvlp.data.optional import require
from fastvlp.data.shards.write import atomic_file
from fastvlp.data.text.cleaning import cut

if TYPE_CHECKING:
    import tokenizers

PAD, UNK, SOT, EOT = "[PAD]", "[UNK]", "[SOT]", "[EOT]"
_SPECIAL = (PAD, UNK, SOT, EOT)


class CaptionTokenizer:
    """Captions to padded ids: ``[SOT] words [EOT] [PAD] ...``.

    Made by ``train_tokenizer`` or ``CaptionTokenizer.load``.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        if tokenizer.truncation is None or tokenizer.padding is None:
            raise ValueError("tokenizer: expected one with truncation and padding to one length")
        # A caption that spells "[EOT]" is text like any other. The setting is not in the file.
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer

    @property
    def context_length(self) -> int:
        """Number of ids per caption, [SOT] and [EOT] included."""
        return self._tokenizer.truncation["max_length"]

    @property
    def vocab_size(self) -> int:
        """Number of ids; ``eot_id`` is the last of them."""
        return self._tokenizer.get_vocab_size()

    @property
    def eot_id(self) -> int:
        """The id of [EOT], the largest of all."""
        return self._tokenizer.token_to_id(EOT)

    def __call__(self, captions: Sequence[str]) -> torch.Tensor:
        """Encode captions to int64 ids ``[len(captions), context_length]``.

        Longer captions lose their last words, never their [EOT]. The rest is filled with 0. Of a
        caption the first 4096 characters are read, or 32 for each id of a longer context.

        Raises:
            TypeError: ``captions`` is a single string or holds something else than strings.
        """
        if isinstance(captions, str) or not all(isinstance(c, str) for c in captions):
            raise TypeError("captions: expected a list of strings; put a single caption in a list")
        context = self.context_length
        encoded = self._tokenizer.encode_batch([cut(caption, context) for caption in captions])
        ids = torch.tensor([e.ids for e in encoded], dtype=torch.int64)
        return ids.view(len(captions), context)

    def decode(self, ids: torch.Tensor) -> list[str]:
        """The text of ids ``[n, length]`` without special tokens; unknown words are lost."""
        return self._tokenizer.decode_batch(ids.tolist(), skip_special_tokens=True)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one JSON file (the format of the ``tokenizers`` library)."""
        with atomic_file(Path(path)) as file:
            file.write(self._tokenizer.to_str(pretty=True).encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CaptionTokenizer:
        """Read what ``save`` wrote."""
        text = Path(path).read_text(encoding="utf-8")
        return cls(require("tokenizers").Tokenizer.from_str(text))


def train_tokenizer(
    captions: Iterable[str],
    model: Literal["word", "bpe"] = "word",
    vocab_size: int = 4096,
    context_length: int | None = None,
) -> CaptionTokenizer:
    """Train a tokenizer on ``captions``.

    Text is lower-cased, stripped of accents, and split at white space and around punctuation.

    Args:
        captions: the training captions, of each the first 4096 characters.
        model: "word" gives every word an id and all words not seen in training the one id of
            [UNK]; "bpe" splits words into pieces (byte-pair encoding, Sennrich et al. 2016), so
            that an unseen word is still spelled out.
        vocab_size: largest number of ids, the four special ones included. The most frequent words
            or pieces are kept; "bpe" goes over it rather than lose a character it has seen.
        context_length: ids per caption; by default what the longest training caption needs.

    Raises:
        ValueError: ``model`` is unknown, ``vocab_size`` or ``context_length`` too small to hold
            anything, or there are no captions.
    """
    captions = [cut(caption, context_length or 0) for caption in captions]
    if model not in ("word", "bpe"):
        raise ValueError(f"model: expected 'word' or 'bpe'; got {model!r}")
    if vocab_size <= len(_SPECIAL):
        raise ValueError(f"vocab_size: expected more than {len(_SPECIAL)}; got {vocab_size}")
    if context_length is not None and context_length < 3:
        raise ValueError(f"context_length: expected 3 or more; got {context_length}")
    if not captions:
        raise ValueError("captions: expected at least one; got none")
    tokenizer = _train(captions, model, vocab_size)
    if context_length is None:
        context_length = max(3, *(len(e.ids) for e in tokenizer.encode_batch(captions)))
    tokenizer.enable_truncation(max_length=context_length)
    tokenizer.enable_padding(length=context_length, pad_id=0, pad_token=PAD)
    return CaptionTokenizer(tokenizer)


def _train(captions: list[str], model: str, vocab_size: int) -> tokenizers.Tokenizer:
    lib = require("tokenizers")
    options = {
        "vocab_size": vocab_size - 1,
        "special_tokens": [PAD, UNK, SOT],
        "show_progress": False,
    }
    split = lib.pre_tokenizers.BertPreTokenizer()
    if model == "word":
        tokenizer = lib.Tokenizer(lib.models.WordLevel(unk_token=UNK))
        tokenizer.pre_tokenizer = split
        trainer = lib.trainers.WordLevelTrainer(**options)
    else:
        # The start of a word is a symbol of its own. An end-of-word suffix would be a form of each
        # letter, unknown for letters that end no training word, and numbered anew on every run.
        mark = lib.pre_tokenizers.Metaspace(prepend_scheme="always")
        tokenizer = lib.Tokenizer(lib.models.BPE(unk_token=UNK))
        tokenizer.pre_tokenizer = lib.pre_tokenizers.Sequence([split, mark])
        tokenizer.decoder = lib.decoders.Metaspace(prepend_scheme="always")
        trainer = lib.trainers.BpeTrainer(**options)
    tokenizer.normalizer = lib.normalizers.BertNormalizer(strip_accents=True, lowercase=True)
    tokenizer.train_from_iterator(captions, trainer, length=len(captions))
    # Added last, so that its id is the largest.
    tokenizer.add_special_tokens([EOT])
    tokenizer.post_processor = lib.processors.TemplateProcessing(
        single=f"{SOT} $A {EOT}",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in (SOT, EOT)],
    )
    return tokenizer
