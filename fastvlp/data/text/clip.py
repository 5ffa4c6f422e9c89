"""CLIP's tokenizer: byte-level byte-pair encoding of 49,408 entries over HF ``tokenizers``.

    <start of text> pieces of the words <end of text> 0 0 0 ...

Text is cleaned (``clean_clip``), split into English contractions, runs of letters, single digits
and runs of other symbols, turned into bytes, and merged by rank; the last piece of a word is
another entry than the same bytes elsewhere. The end-of-text id is the largest, so a text tower can
pool at ``ids.argmax(-1)``.

Source: Radford et al. 2021, arXiv 2103.00020, section 2.4, and OpenAI's published merges file.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

from fastvlp.data.optional import require
from fastvlp.data.shards.write import atomic_file
from fastvlp.data.text.base import TextTokenizer, packaged_file
from fastvlp.data.text.cleaning import clean_clip

MERGES_FILE = "bpe_simple_vocab_16e6.txt.gz"
# The published file holds more merges than the vocabulary was cut to.
_MERGES = 49152 - 256 - 2
_PIECES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+)"
# OpenAI's and Hugging Face's spelling, open_clip's spelling.
STARTS = ("<|startoftext|>", "<start_of_text>")
ENDS = ("<|endoftext|>", "<end_of_text>")

_Vocabulary = tuple[dict[str, int], list[tuple[str, str]]]


class ClipTokenizer(TextTokenizer):
    """Captions to int64 ids [n, 77], equal to OpenAI's and open_clip's.

    One difference: a caption that spells a special token ("<end_of_text>") is text like any other,
    so no caption can end early; ``special_tokens_in_text`` reads it as the token, spelled as in the
    source (a merges file has no spelling: open_clip's).

    Args:
        source: ``bpe_simple_vocab_16e6.txt.gz`` (or unpacked), a ``tokenizer.json``, a
            ``vocab.json`` with ``merges.txt`` beside it, or a folder with one of these. By default
            the merges file that open_clip_torch or OpenAI's package brings.
        context_length: ids of a caption, start and end included.
        truncate: cut longer captions and put the end of text into the last place; otherwise they
            are an error, as in OpenAI's ``tokenize``. open_clip always cuts.
        clean: applied to every caption; None for captions that are clean already.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | None = None,
        *,
        context_length: int = 77,
        truncate: bool = False,
        clean: Callable[[str], str] | None = clean_clip,
        special_tokens_in_text: bool = False,
    ) -> None:
        lib = require("tokenizers")
        vocabulary, merges = _read(source)
        start = _special(vocabulary, STARTS)
        self.eot_id = _special(vocabulary, ENDS)
        model = lib.models.BPE(vocabulary, merges, end_of_word_suffix="</w>")
        tokenizer = lib.Tokenizer(model)
        tokenizer.pre_tokenizer = lib.pre_tokenizers.Sequence(
            [
                # Inverted: what does not match, white space, is removed.
                lib.pre_tokenizers.Split(lib.Regex(_PIECES), "removed", invert=True),
                lib.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        # All bytes first: a character may lie across pieces.
        tokenizer.decoder = lib.decoders.Sequence(
            [lib.decoders.ByteLevel(), lib.decoders.Replace("</w>", " ")]
        )
        if special_tokens_in_text:
            known = [name for name in (*STARTS, *ENDS) if name in vocabulary]
            tokenizer.add_special_tokens(known)
        super().__init__(
            tokenizer,
            start,
            self.eot_id,
            0,
            vocab_size=len(set(vocabulary.values())),
            context_length=context_length,
            padding="max_length",
            truncate=truncate,
            clean=clean,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a tokenizer.json, which is a `source`; it tells the context length besides."""
        content = json.loads(self._tokenizer.to_str())
        content["truncation"] = {
            "max_length": self.context_length,
            "strategy": "LongestFirst",
            "stride": 0,
            "direction": "Right",
        }
        with atomic_file(Path(path)) as file:
            file.write(json.dumps(content, ensure_ascii=False, indent=2).encode())


def _read(source: str | os.PathLike[str] | None) -> _Vocabulary:
    if source is None:
        # OpenAI's package is called clip.
        path = packaged_file({"open_clip": MERGES_FILE, "clip": MERGES_FILE}, "CLIP's merges file")
    else:
        path = Path(source)
    if path.is_dir():
        names = ("tokenizer.json", "vocab.json", MERGES_FILE)
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"source: expected {' or '.join(names)} in {path}; got none")
        path = found[0]
    if path.name == "vocab.json":
        merges = (path.parent / "merges.txt").read_text(encoding="utf-8").split("\n")[1:]
        return json.loads(path.read_text(encoding="utf-8")), _pairs(merges)
    if path.suffix == ".json":
        model = json.loads(path.read_text(encoding="utf-8"))["model"]
        if model.get("type", "BPE") != "BPE" or model.get("end_of_word_suffix") != "</w>":
            raise ValueError(f"source: expected the tokenizer.json of a CLIP model; got {path}")
        return model["vocab"], _pairs(model["merges"])
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    return _from_merges(_pairs(text.split("\n")[1 : _MERGES + 1]))


def _pairs(merges: list[str] | list[list[str]]) -> list[tuple[str, str]]:
    """Merges as pairs; files hold "a b", newer JSON files ["a", "b"]."""
    split = [merge.split() if isinstance(merge, str) else merge for merge in merges if merge]
    return [(left, right) for left, right in split]


def _from_merges(merges: list[tuple[str, str]]) -> _Vocabulary:
    # CLIP orders the bytes by the characters that stand for them.
    characters = sorted(require("tokenizers").pre_tokenizers.ByteLevel.alphabet())
    entries = [*characters, *(c + "</w>" for c in characters), *(a + b for a, b in merges)]
    vocabulary = {entry: number for number, entry in enumerate(entries)}
    vocabulary[STARTS[1]] = len(entries)
    vocabulary[ENDS[1]] = len(entries) + 1
    return vocabulary, merges


def _special(vocabulary: dict[str, int], names: tuple[str, ...]) -> int:
    for name in names:
        if name in vocabulary:
            return vocabulary[name]
    raise ValueError(f"source: expected a vocabulary with {' or '.join(names)}; it has neither")
