"""Fixed splits of the OpenMoji pairs for two kinds of generalisation.

*concept*: a tenth of the base emoji with all their variants, so neither the thing nor, often, its
word has been seen. *composition*: a fifth of the variants (skin tone, hair, gender) of the other
base emoji, so a new combination of words and shapes that have each been seen. *train*: the rest.

Membership depends only on the code points, through SHA-256, never on the order in which packages
list them or on the platform.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fastvlp.data.openmoji.pairs import Pair

SPLITS = ("train", "composition", "concept")

# Chosen once, by counts alone: close to the nominal shares, and none of the few bases that have
# more than 30 variants (plain people, couples, wrestlers) fills the concept split by itself.
_SALT = "fastvlp-openmoji-16"
_CONCEPT_SHARE = 0.1
_COMPOSITION_EVERY = 5

_DROPPED_CODES = {"FE0F", "200D", "2640", "2642", "27A1"}  # selector, joiner, gender, direction
_TONE_AND_HAIR_CODES = {f"{c:X}" for c in [*range(0x1F3FB, 0x1F400), *range(0x1F9B0, 0x1F9B4)]}
_PERSON, _CHILD = "1F9D1", "1F9D2"
_NEUTRAL_CODES = {
    "1F468": _PERSON,  # man
    "1F469": _PERSON,  # woman
    "1F471": _PERSON,  # person: blond hair
    "1F9D4": _PERSON,  # person: beard
    "1F466": _CHILD,  # boy
    "1F467": _CHILD,  # girl
}
_PERSON_WORDS = frozenset(
    "man men woman women person people adult boy girl child and facing right".split()
)


@dataclass(frozen=True)
class SplitPair:
    """A pair, the code of its base emoji, and the split it belongs to."""

    pair: Pair
    base: str
    split: str


def words(caption: str) -> list[str]:
    """Lower-case words of a caption, without punctuation."""
    return re.findall(r"\w+", caption.lower())


def assign_splits(pairs: Sequence[Pair]) -> list[SplitPair]:
    """Assign every pair to a split; the result is sorted by code.

    All captions of one drawing go the same way, so a withheld image is never seen in training
    under another name. Of these captions a withheld split keeps the shortest one only, since
    retrieval between equal images has no right answer; the others are left out altogether.
    """
    chosen: list[SplitPair] = []
    for base, members in group_by_base(pairs).items():
        if _unit_interval(base) < _CONCEPT_SHARE:
            withheld, split = {pair.drawing for pair in members}, "concept"
        else:
            withheld, split = _withheld_variants(members), "composition"
        chosen += [SplitPair(p, base, "train") for p in members if p.drawing not in withheld]
        for drawing in withheld:
            captions = [pair for pair in members if pair.drawing == drawing]
            shortest = min(captions, key=lambda pair: (len(pair.caption), pair.code))
            chosen.append(SplitPair(shortest, base, split))
    return sorted(chosen, key=lambda item: item.pair.code)


def group_by_base(pairs: Iterable[Pair]) -> dict[str, list[Pair]]:
    """Group pairs by base emoji; each key is the shortest, then smallest code of its group.

    Two pairs share a base when their codes agree but for tone, hair, gender and direction, or when
    their names do (Unicode spells "kiss" and "kiss: woman, man" without a common code point), or
    when they share a drawing.
    """
    pairs = sorted(pairs)
    parent = list(range(len(pairs)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first: dict[tuple[str, str], int] = {}
    for index, pair in enumerate(pairs):
        for key in (("code", _code_key(pair)), ("name", _name_key(pair)), ("svg", pair.drawing)):
            if key[1]:
                parent[root(index)] = root(first.setdefault(key, index))
    groups: dict[int, list[Pair]] = {}
    for index, pair in enumerate(pairs):
        groups.setdefault(root(index), []).append(pair)
    return {min((len(p.code), p.code) for p in group)[1]: group for group in groups.values()}


def _code_key(pair: Pair) -> str:
    parts = [part for part in pair.code.split("-") if part not in _DROPPED_CODES]
    bare = [part for part in parts if part not in _TONE_AND_HAIR_CODES]
    return "-".join(_NEUTRAL_CODES.get(part, part) for part in bare)


def _name_key(pair: Pair) -> str:
    if pair.caption.startswith("flag: "):
        return pair.caption
    return " ".join(w for w in words(pair.caption.split(": ")[0]) if w not in _PERSON_WORDS)


def _withheld_variants(members: Sequence[Pair]) -> set[str]:
    """A fifth of the drawings of a base, rounded down, such that the rest still has every word."""
    drawings: dict[str, set[str]] = {}
    for pair in members:
        drawings.setdefault(pair.drawing, set()).update(words(pair.caption))
    codes: dict[str, str] = {}
    for pair in sorted(members, reverse=True):
        codes[pair.drawing] = pair.code
    withheld: set[str] = set()
    for drawing in sorted(drawings, key=lambda d: _unit_interval(codes[d])):
        if len(withheld) == len(drawings) // _COMPOSITION_EVERY:
            break
        rest = [w for d, w in drawings.items() if d != drawing and d not in withheld]
        if drawings[drawing] <= set().union(*rest):
            withheld.add(drawing)
    return withheld


def _unit_interval(code: str) -> float:
    digest = hashlib.sha256(f"{_SALT}:{code}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
