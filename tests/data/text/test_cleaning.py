"""Cleaning rules against open_clip's functions and worked examples."""

import sys
import time
import warnings

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from open_clip.tokenizer import get_clean_fn

from fastvlp.data.text import cleaning
from fastvlp.data.text.cleaning import LONGEST, clean_albef, clean_clip, clean_clip_cased, cut

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


@pytest.mark.parametrize("clean", [clean_clip, clean_clip_cased, clean_albef])
@pytest.mark.parametrize("part", ["amp;", "9", "#9", "Ã©", "<person>", "\u2028", "&lt;b>"])
def test_cleaning_looks_at_the_beginning_only(clean, part):
    """A caption of 400,000 characters took minutes, and one with so long a number raised."""
    caption = "&#" + part * (400_000 // len(part))
    begin = time.process_time()
    cleaned = clean(caption)
    assert time.process_time() - begin < 2
    assert cleaned == clean(caption[:LONGEST])
    assert len(cut("x" * 10_000)) == LONGEST and len(cut("x" * 10_000, 200)) == 6400


@pytest.mark.parametrize("clean", [clean_clip, clean_albef])
def test_captions_up_to_the_bound_are_cleaned_whole(clean):
    caption = ("x" * (LONGEST // 25 - 1) + " ") * 25
    assert clean(caption) == caption.strip() and LONGEST - len(caption) < 25
