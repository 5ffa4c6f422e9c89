"""Every kind of tokenizer file is recognised, and one of a wrong kind is named."""

import json

import pytest
import torch
from fastvlp_tests.tiny_vocabularies import MERGES, bert_vocabulary, bpe_file

from fastvlp.data.text import BertTokenizer, CaptionTokenizer, ClipTokenizer, train_tokenizer
from fastvlp.data.text import files as tokenizer_files

TEXTS = ["a cat", "the cats sat", "Zoë " * 50]


@pytest.fixture
def files(tmp_path):
    """A file of each form, by name."""
    clip = ClipTokenizer(bpe_file(tmp_path), context_length=12, truncate=True)
    clip.save(tmp_path / "clip.json")
    folder = tmp_path / "pairs"
    folder.mkdir()
    vocabulary = clip._tokenizer.get_vocab()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))
    (tmp_path / "plain.txt").write_text("\n".join(["version", *MERGES, ""]))
    train_tokenizer(TEXTS, context_length=9).save(tmp_path / "captions.json")
    bert_vocabulary(tmp_path)
    return {
        "gz": tmp_path / "bpe_simple_vocab_16e6.txt.gz", "txt": tmp_path / "plain.txt",
        "pairs": folder, "vocab": folder / "vocab.json", "json": tmp_path / "clip.json",
        "captions": tmp_path / "captions.json", "bert": tmp_path / "vocab.txt",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["gz", "txt", "pairs", "vocab", "json"])
def test_clips_files_are_clips_tokenizer(files, name):
    wanted = ClipTokenizer(files["gz"], context_length=12, truncate=True)
    found = tokenizer_files.for_clip(files[name], 12)
    assert isinstance(found, ClipTokenizer) and found.vocab_size == wanted.vocab_size
    assert torch.equal(found(TEXTS), wanted(TEXTS))
    assert (found(TEXTS).max(1).values == found.eot_id).all()


def test_a_saved_tokenizer_keeps_its_length(files):
    assert tokenizer_files.for_clip(files["json"]).context_length == 12
    assert tokenizer_files.for_clip(files["gz"]).context_length == 77


def test_learned_tokenizers_are_recognised(files):
    found = tokenizer_files.for_clip(files["captions"])
    assert isinstance(found, CaptionTokenizer) and found.context_length == 9


def test_berts_vocabulary_is_for_the_others(files):
    assert BertTokenizer(tokenizer_files.for_bert(files["bert"])).vocab_size == 8
    with pytest.raises(
        ValueError,
        match=r"tokenizer: expected CLIP's byte-pair.*CaptionTokenizer.*found BERT's WordPiece in",
    ):
        tokenizer_files.for_clip(files["bert"])
    for name in ("gz", "captions"):
        with pytest.raises(ValueError, match=r"tokenizer: expected BERT's WordPiece .*; found "):
            tokenizer_files.for_bert(files[name])


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("a.txt", b"one word\nthree words here\n", "2 lines that begin with 'one word'"),
        ("a.txt", b"\xff\xfe\x00", "no text"),
        ("a.gz", b"nothing", "no text"),
        ("a.json", b"{", "broken JSON"),
        ("a.json", b"[1]", "a JSON list"),
        ("a.json", b'{"a": 1}', "JSON without a tokenizer's model"),
        ("a.json", b'{"model": {"type": "Unigram"}}', "a tokenizer of the type Unigram"),
    ],
)
def test_other_files_are_named(tmp_path, name, content, found):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"found {found} in .*{name}"):
        tokenizer_files.for_clip(tmp_path / name)


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer: .*none.txt does not exist"):
        tokenizer_files.for_clip(tmp_path / "none.txt")
    with pytest.raises(FileNotFoundError, match="tokenizer: expected one of tokenizer.json"):
        tokenizer_files.for_bert(tmp_path)
