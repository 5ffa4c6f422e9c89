"""Which tokenizer a file holds, for commands that are given one.

A CLIP pools its text tower at the largest id, so it takes a ``ClipTokenizer`` or a
``CaptionTokenizer``, whose end of text that is; ViLT and ALBEF take BERT's.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from fastvlp.data.text import bert as bert_tokenizer
from fastvlp.data.text import clip as clip_tokenizer
from fastvlp.data.text import learned as caption_tokenizer
from fastvlp.data.text.clip import MERGES_FILE, ClipTokenizer
from fastvlp.data.text.learned import CaptionTokenizer

CLIP, BERT, CAPTIONS = "CLIP's byte-pair encoding", "BERT's WordPiece", "a CaptionTokenizer"
_ACCEPTED = {
    CLIP: f"{MERGES_FILE}, vocab.json with merges.txt, or a tokenizer.json of CLIP",
    CAPTIONS: "a tokenizer.json that `fastvlp train clip` wrote",
    BERT: "vocab.txt, or a tokenizer.json of BERT",
}
_NAMES = ("tokenizer.json", "vocab.json", MERGES_FILE, "vocab.txt")


def for_clip(path: Path, context_length: int = 77) -> ClipTokenizer | CaptionTokenizer:
    """The tokenizer of a CLIP, which cuts longer captions, as in training.

    Args:
        path: a file of one of the kinds, or a folder with it.
        context_length: ids of a caption, for files that do not say.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds another kind of tokenizer.
    """
    path = _file(path)
    if expect(path, CLIP, CAPTIONS) == CAPTIONS:
        return CaptionTokenizer.load(path)
    known = _length(path) or context_length
    return ClipTokenizer(path, context_length=known, truncate=True)


def for_bert(path: Path) -> Path:
    """The file that a BertTokenizer is made from; errors as in `for_clip`."""
    path = _file(path)
    expect(path, BERT)
    return path


def expect(path: Path, *kinds: str) -> str:
    """The kind of tokenizer in a file, one of `kinds`.

    Raises:
        ValueError: it is none of them; the message says what it is.
    """
    found = _kind(path)
    if found not in kinds:
        wanted = "; or ".join(f"{kind} ({_ACCEPTED[kind]})" for kind in kinds)
        raise ValueError(f"tokenizer: expected {wanted}; found {found} in {path}")
    return found


def _file(path: Path) -> Path:
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in _NAMES if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"tokenizer: expected one of {', '.join(_NAMES)} in {path}")
        return found[0]
    if not path.is_file():
        raise FileNotFoundError(f"tokenizer: {path} does not exist")
    return path


def _kind(path: Path) -> str:
    """One of the kinds, or what there is in place of it."""
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError):
        return "no text"
    if path.suffix != ".json":
        return _kind_of_lines(text.split("\n"))
    try:
        content = json.loads(text)
    except json.JSONDecodeError:
        return "broken JSON"
    if not isinstance(content, dict):
        return "a JSON list"
    return _kind_of_settings(content)


def _kind_of_lines(lines: list[str]) -> str:
    if set(bert_tokenizer.SPECIAL) <= set(lines):
        return BERT
    # A first line that tells the version, then pairs.
    pairs = [line for line in lines[1:] if line]
    if pairs and all(len(line.split()) == 2 for line in pairs):
        return CLIP
    return f"{len(pairs) + 1} lines that begin with {lines[0][:40]!r}"


def _kind_of_settings(content: dict) -> str:
    model = content.get("model")
    if not isinstance(model, dict):
        ends = [name for name in clip_tokenizer.ENDS if name in content]
        return CLIP if ends else "JSON without a tokenizer's model"
    if model.get("type") == "WordPiece":
        return BERT
    if model.get("end_of_word_suffix") == "</w>":
        return CLIP
    added = {token["content"] for token in content.get("added_tokens", [])}
    if {caption_tokenizer.SOT, caption_tokenizer.EOT} <= added and content.get("truncation"):
        return CAPTIONS
    return f"a tokenizer of the type {model.get('type')}"


def _length(path: Path) -> int | None:
    """Ids of a caption, where the file says it."""
    if path.name == "vocab.json" or path.suffix != ".json":
        return None
    return (json.loads(path.read_text(encoding="utf-8")).get("truncation") or {}).get("max_length")
