"""Tokenizers of fastvlp as files that transformers' AutoTokenizer loads."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from fastvlp.data.optional import require
from fastvlp.data.text.clip import ENDS, STARTS, ClipTokenizer
from fastvlp.data.text.learned import EOT, PAD, SOT, UNK, CaptionTokenizer


def save_for_transformers(
    tokenizer: CaptionTokenizer | ClipTokenizer, folder: str | os.PathLike[str]
) -> None:
    """Write tokenizer.json and tokenizer_config.json for ``AutoTokenizer.from_pretrained(folder)``.

    Called with ``padding="max_length", max_length=tokenizer.context_length, truncation=True`` it
    gives the same ids. Of CLIP's vocabulary the text is lower-cased and its white space joined, as
    transformers does it; mended encodings and HTML entities (`clean_clip`) stay as they are.

    Raises:
        TypeError: it is another kind of tokenizer.

    Examples:
        >>> from fastvlp.data.text import train_tokenizer
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_for_transformers(train_tokenizer(["a red bus"]), folder)
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['tokenizer.json', 'tokenizer_config.json']
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(tokenizer, CaptionTokenizer):
        tokenizer.save(folder / "tokenizer.json")
        special = {"bos_token": SOT, "eos_token": EOT, "pad_token": PAD, "unk_token": UNK}
    elif isinstance(tokenizer, ClipTokenizer):
        special = _save_clip(tokenizer, folder / "tokenizer.json")
    else:
        raise TypeError(
            "tokenizer: expected a CaptionTokenizer or a ClipTokenizer, got "
            f"{type(tokenizer).__name__}"
        )
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": tokenizer.context_length,
        "clean_up_tokenization_spaces": False,
        **special,
    }
    text = json.dumps(described, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(f"{text}\n", encoding="utf-8")


def _save_clip(tokenizer: ClipTokenizer, file: Path) -> dict[str, str]:
    lib = require("tokenizers")
    with tempfile.TemporaryDirectory() as place:
        tokenizer.save(Path(place) / "tokenizer.json")
        whole = lib.Tokenizer.from_file(str(Path(place) / "tokenizer.json"))
    vocabulary = whole.get_vocab()
    start, end = (next(n for n in names if n in vocabulary) for names in (STARTS, ENDS))
    padding = next(name for name, id_ in vocabulary.items() if id_ == tokenizer.pad_id)
    whole.normalizer = lib.normalizers.Sequence(
        [
            lib.normalizers.NFC(),
            lib.normalizers.Replace(lib.Regex(r"\s+"), " "),
            lib.normalizers.Lowercase(),
        ]
    )
    whole.add_special_tokens([start, end])
    whole.post_processor = lib.processors.TemplateProcessing(
        single=f"{start} $A {end}",
        special_tokens=[(name, vocabulary[name]) for name in (start, end)],
    )
    whole.save(str(file))
    return {"bos_token": start, "eos_token": end, "pad_token": padding, "unk_token": end}
