"""What each system does to a caption before it is split into tokens.

    clean_clip         CLIP (Radford et al. 2021, arXiv 2103.00020; OpenAI's tokenizer): repair of
                       wrongly decoded text, HTML entities resolved twice, white space collapsed,
                       lower case
    clean_clip_cased   the same without lower case (some open_clip models)
    clean_albef        ALBEF (arXiv 2107.07651, published code): lower case, punctuation deleted,
                       hyphens and slashes to spaces, "<person>" to "person", at most 30 words

BERT's own normalisation (lower case, accents) belongs to its tokenizer, and is all that ViLT does.

Each looks at the first ``LONGEST`` characters of a caption only: many times what the 77 tokens of a
CLIP or 30 words hold, and what keeps the repair, whose time grows with the square of the length,
within some hundredths of a second for any input.
"""

from __future__ import annotations

import functools
import html
import re
import warnings
from collections.abc import Callable

# Below the 4,300 digits that Python takes for a number: html.unescape raises at a longer "&#9...".
LONGEST = 4096
_DELETED = str.maketrans("-/", "  ", ",.'!?\"()*#:;~")


def cut(caption: str, tokens: int = 0) -> str:
    """The beginning of a caption that is looked at: ``LONGEST`` characters, or 32 for each of
    ``tokens`` where that is more."""
    return caption[: max(LONGEST, 32 * tokens)]


def clean_clip(caption: str) -> str:
    """Repair, resolve HTML entities, collapse white space, lower case.

    The repair is done by ``ftfy`` where that is installed, else not at all, with one warning.
    """
    return clean_clip_cased(caption).lower()


def clean_clip_cased(caption: str) -> str:
    """``clean_clip`` with the case of the letters kept."""
    caption = cut(caption)
    # Printable ASCII is never repaired, and entities begin with "&": most captions skip both.
    if "&" in caption or not (caption.isascii() and caption.isprintable()):
        caption = html.unescape(html.unescape(_repair()(caption)))
    return " ".join(caption.split())


def clean_albef(caption: str, max_words: int = 30) -> str:
    """ALBEF's cleaning of pre-training and retrieval captions.

    Only one space of a run of spaces is kept, as there, and the words after ``max_words`` are lost.
    (LAVIS allows 50.)
    """
    caption = cut(caption).lower().translate(_DELETED).replace("<person>", "person")
    caption = re.sub(r"\s{2,}", " ", caption).rstrip("\n").strip(" ")
    return " ".join(caption.split(" ")[:max_words])


@functools.cache
def _repair() -> Callable[[str], str]:
    try:
        from ftfy import fix_text
    except ImportError:
        warnings.warn(
            "CLIP's cleaning of captions repairs wrongly decoded text with ftfy, which is not "
            "installed: a caption with characters outside ASCII may get other tokens than CLIP "
            "gave it; pip install ftfy",
            stacklevel=4,
        )
        return str
    return fix_text
