"""Cleaning rules against open_clip's functions and worked examples."""

import sys
import warnings

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from open_clip.tokenizer import get_clean_fn

from fastvlp.data import cleaning
from fastvlp.data.cleaning import clean_albef, clean_clip, clean_clip_cased

_pieces = st.sampled_from(
    ["&amp;", "&amp;lt;", "&#8217;", "âœ”", "schÃ¶n", "“", "İ", "<b>", "\x1b[1m", "\r\n", "\u2028"]
)
_texts = st.lists(st.text(max_size=12) | _pieces, max_size=6).map("".join)


@given(_texts | st.text(st.characters(max_codepoint=127)))
@example("")
@example("a &amp;amp; b")
def test_clip_cleaning_is_open_clips(text):
    assert clean_clip(text) == get_clean_fn("lower")(text)
    assert clean_clip_cased(text) == get_clean_fn("whitespace")(text)


def test_without_ftfy_there_is_one_warning_and_no_repair(monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    cleaning._repair.cache_clear()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert clean_clip("Plain  ASCII") == "plain ascii"
        with pytest.warns(UserWarning, match="pip install ftfy"):
            assert clean_clip("schÃ¶n &amp;amp; &lt;gut&gt;") == "schã¶n & <gut>"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert clean_clip("É") == "é"
    finally:
        cleaning._repair.cache_clear()


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("A dog's <person>, on-the/grass!", "a dogs person on the grass"),
        ('(One) "two" * three # four; five: six? ~seven.', "one two three four five six seven"),
        ("kept: _ & % $ [ ] + = @ “curly” é", "kept _ & % $ [ ] + = @ “curly” é"),
        ("  spaces \t\n inside  ", "spaces inside"),
        ("one\nnewline stays, two\n", "one\nnewline stays two"),
        ("", ""),
        ("?!.", ""),
        (" ".join(["w"] * 31), " ".join(["w"] * 30)),
    ],
)
def test_albef_cleaning(caption, cleaned):
    assert clean_albef(caption) == cleaned


def test_albef_cleaning_counts_words():
    assert clean_albef("a b c d", max_words=2) == "a b"
