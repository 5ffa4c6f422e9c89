"""What every reader of image–caption pairs gives: pairs, and rows that are none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

# Images of the last ones cannot be put into shards; they are named as broken, not passed over.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")


@dataclass(frozen=True)
class Embedded:
    """Where an image itself lies in a parquet file."""

    file: str
    column: str
    row: int


@dataclass(frozen=True)
class Pair:
    """One image with one caption.

    Attributes:
        image: path as the source has it.
        caption: not empty.
        id: equal for captions of the same image; "" for an embedded image whose bytes tell it.
        place: where in the source it stands.
        embedded: where the image is taken from in place of ``image``.
    """

    image: str
    caption: str
    id: str
    place: str
    embedded: Embedded | None = None


@dataclass(frozen=True)
class Broken:
    """A row that gives no sample: where it stands, what kind of fault, and the particulars."""

    place: str
    fault: str
    detail: str


@dataclass(frozen=True)
class Columns:
    """Names of columns; None for the usual names."""

    image: str | None = None
    caption: str | None = None
    id: str | None = None


Rows = Iterator[Pair | Broken]


def open_text(path: Path) -> TextIO:
    """Text whose wrong bytes come through as lone surrogates, to be found row by row."""
    return open(path, encoding="utf-8-sig", errors="surrogateescape", newline="")


def pair(
    image: str, caption: str, identity: str | None, place: str, embedded: Embedded | None = None
) -> Pair | Broken:
    """The pair of a row's texts, or what it lacks. Ids stay as they are written."""
    image, caption = image.strip(), caption.strip()
    if not image:
        return Broken(place, "no image path", caption[:80])
    if not caption:
        return Broken(place, "empty caption", image)
    if not (identity or "").strip():
        identity = "" if embedded else Path(image).as_posix()
    for text in (image, caption, identity):
        try:
            text.encode()
        except UnicodeEncodeError:
            return Broken(place, "not UTF-8", ascii(text)[:80])
    return Pair(image, caption, identity, place, embedded)


def malformed(place: str, detail: str) -> Broken:
    """A row that is not of its source's form."""
    return Broken(place, "malformed row", detail[:200].encode(errors="replace").decode())
