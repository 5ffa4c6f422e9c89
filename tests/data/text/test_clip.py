"""CLIP's tokenizer against open_clip's, whatever file it is read from."""

import gzip
import json
import sys
import unicodedata
from pathlib import Path

import open_clip
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer

from fastvlp.data.text import ClipTokenizer
from fastvlp.data.text.cleaning import clean_clip_cased

CAPTIONS = [
    "a photo of a dog",
    "It's 3 o'clock; WE'LL see 12,000 &amp;amp; <b>more</b>\t!\n",
    "",
    "café naïve — “quotes”, schÃ¶n",
    "👩🏽‍🚀 and 🇸🇹, ❤️",
    "日本語 русский עברית हिन्दी",
    "İſ 'ſ ß ﬁ",
    "word " * 75,
]
TOO_LONG = ["word " * 76, "🇸🇹" * 80]
MERGES = Path(open_clip.__file__).with_name("bpe_simple_vocab_16e6.txt.gz")


@pytest.fixture(scope="module")
def theirs() -> SimpleTokenizer:
    return SimpleTokenizer()


@pytest.fixture(scope="module")
def ours() -> ClipTokenizer:
    return ClipTokenizer(truncate=True)


def test_ids_are_open_clips(ours, theirs):
    ids = ours(CAPTIONS + TOO_LONG)
    assert ids.dtype == torch.int64 and ids.shape == (len(CAPTIONS + TOO_LONG), 77)
    assert torch.equal(ids, theirs(CAPTIONS + TOO_LONG))
    assert (ours.vocab_size, ours.eot_id) == (49408, 49407)
    assert (ids.max(-1).values == ours.eot_id).all() and (ids[-2:, -1] == ours.eot_id).all()


# Characters of later Unicode versions than the libraries' tables are letters to one, not the other.
_known = st.characters(exclude_categories=["Cs", "Cn", "Co"])
_words = st.sampled_from(["'s", "'LL", "don't", "&amp;", "&#8217;", "</w>", "12", "ﬁ", "🇸🇹", " "])


@given(st.lists(st.text(_known, max_size=20) | _words, max_size=12).map("".join))
@example("ſ'ſ 'ſ")
def test_any_text_gets_open_clips_ids(ours, theirs, text):
    if any(unicodedata.category(c) == "Cn" for c in text):
        text = ""
    assert torch.equal(ours([text]), theirs([text]))


def test_the_case_can_be_kept(theirs):
    cased = ClipTokenizer(truncate=True, clean=clean_clip_cased)
    assert torch.equal(cased(CAPTIONS), SimpleTokenizer(clean="whitespace")(CAPTIONS))
    assert not torch.equal(cased(CAPTIONS), theirs(CAPTIONS))


def test_too_long_is_an_error_unless_cut(theirs):
    strict = ClipTokenizer()
    assert torch.equal(strict(CAPTIONS), theirs(CAPTIONS))
    message = r"at most 77 ids .* caption 1 has 78: 'word .*truncate=True"
    with pytest.raises(ValueError, match=message):
        strict(["dog", *TOO_LONG])
    short = ClipTokenizer(context_length=5, truncate=True)(["a b c d", "a b c"])
    assert short.shape == (2, 5) and (short[:, -1] == short.max()).all()


def test_a_spelled_special_token_is_text_unless_asked_for(ours, theirs):
    text = ["end <end_of_text> of"]
    assert (ours(text) == ours.eot_id).sum() == 1
    assert torch.equal(ClipTokenizer(special_tokens_in_text=True)(text), theirs(text))


@pytest.fixture(scope="module")
def files(ours, tmp_path_factory) -> dict[str, Path]:
    """The same tokenizer in every form that it is given in."""
    folder = tmp_path_factory.mktemp("clip")
    merges = gzip.decompress(MERGES.read_bytes()).decode().split("\n")[1:48895]
    vocabulary = ours._tokenizer.get_vocab()
    for name in ("start", "end"):
        vocabulary[f"<|{name}oftext|>"] = vocabulary.pop(f"<{name}_of_text>")
    paths = {
        "gz": folder / MERGES.name,
        "txt": folder / "bpe.txt",
        "vocab": folder / "vocab.json",
        "json": folder / "only" / "tokenizer.json",
        "pairs": folder / "tokenizer.json",
    }
    paths["gz"].write_bytes(MERGES.read_bytes())
    paths["txt"].write_bytes(gzip.decompress(MERGES.read_bytes()))
    paths["vocab"].write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    paths["json"].parent.mkdir()
    model = {"type": "BPE", "end_of_word_suffix": "</w>", "vocab": vocabulary, "merges": merges}
    paths["json"].write_text(json.dumps({"model": model}))
    model["merges"] = [merge.split() for merge in merges]
    paths["pairs"].write_text(json.dumps({"model": model}))
    paths["folder"] = paths["json"].parent
    return paths


@pytest.mark.parametrize("form", ["gz", "txt", "vocab", "json", "pairs", "folder"])
def test_every_file_gives_the_same_tokenizer(files, form, ours):
    read = ClipTokenizer(files[form], truncate=True)
    assert torch.equal(read(CAPTIONS), ours(CAPTIONS))
    assert (read.vocab_size, read.eot_id) == (ours.vocab_size, ours.eot_id)


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="expected tokenizer.json or vocab.json or"):
        ClipTokenizer(tmp_path)
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"model": {"type": "WordPiece", "vocab": {}}}))
    with pytest.raises(ValueError, match="tokenizer.json of a CLIP model"):
        ClipTokenizer(other)
    nameless = tmp_path / "vocab.json"
    nameless.write_text(json.dumps({"a": 0}))
    (tmp_path / "merges.txt").write_text("#version\n")
    with pytest.raises(ValueError, match="expected a vocabulary with"):
        ClipTokenizer(nameless)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"\(open_clip, clip\); give the path"):
        ClipTokenizer()
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[train\]"'):
        ClipTokenizer(MERGES)


def test_padded_and_packed_are_the_called_ids(ours):
    ids = ours(CAPTIONS)
    padded = ours.padded(CAPTIONS)
    assert torch.equal(padded.ids, ids)
    # The padding is the id of "!", which is a token too: only the mask tells them apart.
    assert torch.equal(padded.mask.sum(1) - 1, ids.argmax(-1))
    exclaimed = ours.padded(["!¬"])
    assert exclaimed.ids[0, 1] == 0 and exclaimed.mask[0, 1] and not exclaimed.mask[0, -1]
    packed = ours.packed(CAPTIONS)
    assert torch.equal(packed.layout.unpack(packed.ids), ids)
    assert torch.equal(packed.layout.last(packed.ids), torch.full((len(CAPTIONS),), ours.eot_id))


def test_decoding(ours):
    texts = ["dogs , cats", "", "café 👩🏽‍🚀 ❤️"]
    assert ours.decode(ours(texts)) == texts


@pytest.mark.parametrize("captions", ["a dog", [b"a dog"], [None]])
def test_refuses_anything_but_a_list_of_strings(ours, captions):
    with pytest.raises(TypeError, match="captions: expected a list of strings"):
        ours(captions)


def test_no_captions(ours):
    assert ours([]).shape == (0, 77) and ours.packed([]).ids.shape == (0,)


def test_of_a_very_long_caption_the_beginning_is_used():
    long = "a cat &" + "amp;" * 100_000
    tokenizer = ClipTokenizer(truncate=True)
    assert torch.equal(tokenizer([long]), tokenizer([long[:4096]]))
    with pytest.raises(ValueError, match="at most 77 ids.*caption 1 has 400007 characters") as info:
        ClipTokenizer()(["a cat", long])
    assert len(str(info.value)) < 2000
