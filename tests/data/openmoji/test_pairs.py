"""Captions, drawings and the join of the two."""

import re

import pytest

from fastvlp.data.openmoji import pairs as openmoji_pairs
from fastvlp.data.openmoji.pairs import caption_of, code_of, drawing_digest


@pytest.mark.parametrize(
    ("emoji", "name", "caption"),
    [
        ("\U0001f40b", ":whale:", "whale"),
        ("\U0001f1f0\U0001f1fc", ":Kuwait:", "flag: Kuwait"),
        ("\U0001f3f4\U000e0067\U000e0062\U000e007f", ":England:", "flag: England"),
        ("\U0001f44b\U0001f3fb", ":waving_hand_light_skin_tone:", "waving hand: light skin tone"),
        ("x", ":man_medium-light_skin_tone_red_hair:", "man: medium-light skin tone, red hair"),
        (
            "x",
            ":men_holding_hands_dark_skin_tone_medium_skin_tone:",
            "men holding hands: dark skin tone, medium skin tone",
        ),
        ("x", ":person_dark_skin_tone_bald:", "person: dark skin tone, bald"),
        ("x", ":hair_pick:", "hair pick"),
    ],
)
def test_captions_get_their_punctuation_back(emoji, name, caption):
    assert caption_of(emoji, name) == caption


def test_code_keeps_selectors_and_joiners():
    assert code_of("\u2764\ufe0f") == "2764-FE0F"
    assert code_of("\U0001f9d1\u200d\U0001f680") == "1F9D1-200D-1F680"


def test_digest_sees_shapes_and_colours_but_not_nesting_or_hundredths():
    base = '<svg id="a"><g id="x"/><g id="b"><path fill="#FFF" d="M1.25,2L3,4"/></g></svg>'
    same = '<svg id="c"><path d="M1.21,2L3,4" fill="#fff"/><g transform="scale(2)"/></svg>'
    assert drawing_digest(base) == drawing_digest(same)
    assert drawing_digest(base) != drawing_digest(base.replace("#FFF", "#FFE"))
    assert drawing_digest(base) != drawing_digest(base.replace("3,4", "3,5"))
    assert drawing_digest(base) != drawing_digest(base.replace("M1.25", "m1.25"))


def test_the_join_covers_the_fully_qualified_emoji():
    pairs = openmoji_pairs.read_pairs()
    assert len(pairs) >= 3900
    assert len({pair.caption for pair in pairs}) == len({pair.code for pair in pairs}) == len(pairs)
    assert pairs == sorted(pairs)
    captions = {pair.code: pair.caption for pair in pairs}
    assert captions["2764-FE0F"] == "red heart"  # its file is 2764.svg
    assert captions["1F468-1F3FB-200D-1F9AF"] == "man with white cane: light skin tone"
    assert all(re.fullmatch(r"[0-9A-F]{4,6}(-[0-9A-F]{4,6})*", pair.code) for pair in pairs)
    assert all(pair.svg.stem in (pair.code, pair.code.replace("-FE0F", "")) for pair in pairs)


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "emoji", None)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[train\]"'):
        openmoji_pairs.read_pairs()
