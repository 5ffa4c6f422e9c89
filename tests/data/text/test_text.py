"""Tokenizers trained on captions."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlp.data.text import CaptionTokenizer, train_tokenizer

CAPTIONS = [
    "woman astronaut: dark skin tone",
    "man astronaut: medium-light skin tone",
    "flag: São Tomé & Príncipe",
    "three o’clock",
    "dog",
]
MODELS = ["word", "bpe"]


@pytest.fixture(scope="module", params=MODELS)
def tokenizer(request) -> CaptionTokenizer:
    return train_tokenizer(CAPTIONS, request.param, vocab_size=200)


def test_word_ids_in_full():
    encode = train_tokenizer(["b a", "a, c", "A"], "word", context_length=6)
    # By frequency, then by spelling, after [PAD] [UNK] [SOT]; [EOT] last.
    a, comma, b, c, eot = 3, 4, 5, 6, 7
    assert encode.vocab_size == 8 and encode.eot_id == eot
    expected = [[2, b, a, eot, 0, 0], [2, a, comma, c, eot, 0], [2, c, 1, eot, 0, 0]]
    assert encode(["B a", "a,c", "c x"]).tolist() == expected


def test_eot_is_the_largest_id_and_where_argmax_points(tokenizer):
    ids = tokenizer(CAPTIONS)
    assert ids.dtype == torch.int64 and ids.shape == (len(CAPTIONS), tokenizer.context_length)
    assert tokenizer.eot_id == tokenizer.vocab_size - 1 == ids.max()
    end = ids.argmax(-1)
    for row, last in zip(ids, end.tolist(), strict=True):
        assert row[0] == 2
        assert (row[1:last] > 2).all()  # words of the training captions are all known
        assert (row[last + 1 :] == 0).all()


def test_the_longest_caption_sets_the_context_length(tokenizer):
    ids = tokenizer(CAPTIONS)
    assert (ids != 0).sum(1).max() == tokenizer.context_length


@pytest.mark.parametrize("model", MODELS)
def test_truncation_keeps_eot(model):
    encode = train_tokenizer(CAPTIONS, model, context_length=5)
    ids = encode([CAPTIONS[0], " ".join(CAPTIONS), "dog"])
    assert ids.shape == (3, 5)
    assert (ids == encode.eot_id).sum(1).tolist() == [1, 1, 1]
    assert ids[0, -1] == ids[1, -1] == encode.eot_id


def test_empty_caption_and_no_captions(tokenizer):
    ids = tokenizer([""])
    assert ids[0, :3].tolist() == [2, tokenizer.eot_id, 0]
    assert tokenizer([]).shape == (0, tokenizer.context_length)
    assert tokenizer([]).dtype == torch.int64


def test_case_and_accents_do_not_matter(tokenizer):
    assert torch.equal(tokenizer(["FLAG: SAO TOME"]), tokenizer(["flag: são tomé"]))


def test_special_names_in_a_caption_are_text(tokenizer):
    ids = tokenizer(["dog [EOT] [SOT] [PAD] dog"])[0]
    assert (ids == tokenizer.eot_id).sum() == 1 and (ids == 2).sum() == 1
    assert ids.argmax() == (ids != 0).sum() - 1


def test_bpe_spells_out_what_word_does_not_know():
    unseen = ["god"]  # letters of "dog"
    word, bpe = (train_tokenizer(CAPTIONS, model) for model in MODELS)
    assert word(unseen)[0, 1] == 1
    assert 1 not in bpe(unseen)[0].tolist()
    assert bpe.decode(bpe(unseen)) == unseen


def test_decode_gives_the_text_back(tokenizer):
    assert tokenizer.decode(tokenizer(["dog", "man astronaut"])) == ["dog", "man astronaut"]


def test_vocab_size_keeps_the_most_frequent_words():
    encode = train_tokenizer(["a a a b b c"], "word", vocab_size=6)
    assert encode.vocab_size == 6
    assert encode(["a b c"])[0, :5].tolist() == [2, 3, 4, 1, 5]


@pytest.mark.parametrize("model", MODELS)
def test_training_twice_gives_the_same_file(tmp_path, model):
    for name in ("a.json", "b.json"):
        train_tokenizer(CAPTIONS, model, vocab_size=100).save(tmp_path / name)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


@settings(deadline=None, max_examples=60)
@given(captions=st.lists(st.text(max_size=40), max_size=4))
def test_any_text_encodes_and_survives_save_and_load(tokenizer, tmp_path_factory, captions):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(path)
    loaded = CaptionTokenizer.load(path)
    texts = [*captions, "[EOT] dog", *CAPTIONS]
    ids = tokenizer(texts)
    assert torch.equal(loaded(texts), ids)
    assert ids.shape == (len(texts), tokenizer.context_length)
    assert ((ids == tokenizer.eot_id).sum(1) == 1).all()
    assert (ids[:, 0] == 2).all() and (ids >= 0).all()
    assert (loaded.vocab_size, loaded.eot_id) == (tokenizer.vocab_size, tokenizer.eot_id)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "char"}, "model: expected 'word' or 'bpe'; got 'char'"),
        ({"vocab_size": 4}, "vocab_size: expected more than 4; got 4"),
        ({"context_length": 2}, "context_length: expected 3 or more; got 2"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        train_tokenizer(CAPTIONS, **options)


def test_bad_captions_are_named(tokenizer):
    with pytest.raises(ValueError, match="captions: expected at least one"):
        train_tokenizer([])
    with pytest.raises(TypeError, match="expected a list of strings"):
        tokenizer("dog")
    with pytest.raises(TypeError, match="expected a list of strings"):
        tokenizer(["dog", None])


def test_a_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[train\]"'):
        train_tokenizer(CAPTIONS)


@pytest.mark.parametrize("model", ["word", "bpe"])
def test_of_a_very_long_caption_the_beginning_is_used(model):
    long = "cat " + "dog " * 100_000
    tokenizer = train_tokenizer([long, "a bird"], model)
    assert tokenizer.context_length == 1024 + 2  # the words of 4096 characters
    (row,) = tokenizer([long]).tolist()
    assert row == tokenizer(["cat" + " dog" * 2000]).tolist()[0] and row[-1] == tokenizer.eot_id
