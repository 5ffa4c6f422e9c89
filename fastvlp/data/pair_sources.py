"""Image–caption pairs as people have them, read into one list.

    folder      images in any depth, each with a text file of the same name beside it, one caption
                per line
    csv, tsv    a header, then a path, a caption and optionally an image id in each row
    parquet     the same columns (needs pyarrow)
    coco        the JSON of COCO captions: "images" and "annotations"
    flickr30k   the token file (name#number, a tab, the caption) or the CSV parted by "|"

A row that cannot be used is set aside with its place and the reason, never silently lost. Whether
an image is there and can be decoded is not looked at here. All pairs are held in memory.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastvlp.data.optional import require

Kind = Literal["folder", "csv", "tsv", "parquet", "coco", "flickr30k"]
KINDS: tuple[Kind, ...] = ("folder", "csv", "tsv", "parquet", "coco", "flickr30k")

# Images of the last ones cannot be put into shards; they are named as broken, not passed over.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
_IMAGE_COLUMNS = ("path", "filepath", "file_path", "image_path", "image", "image_name")
_IMAGE_COLUMNS += ("file_name", "filename", "file")
_CAPTION_COLUMNS = ("caption", "title", "text", "sentence", "comment")
_ID_COLUMNS = ("image_id",)


@dataclass(frozen=True)
class Pair:
    """One image with one caption.

    Attributes:
        image: path as the source has it.
        caption: not empty.
        id: equal for captions of the same image.
        place: where in the source it stands.
    """

    image: str
    caption: str
    id: str
    place: str


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


def read_pairs(
    source: Path, kind: Kind | None = None, columns: Columns | None = None
) -> tuple[list[Pair], list[Broken]]:
    """All pairs of ``source`` in its order, and the rows that are none.

    Args:
        source: a folder or a file.
        kind: one of KINDS; None to tell it from the name and the first line.
        columns: for CSV, TSV and parquet.

    Raises:
        FileNotFoundError: there is no such source.
        ValueError: its kind cannot be told, a column is missing, or the file as a whole is not of
            its kind.
    """
    if not source.exists():
        raise FileNotFoundError(f"source: expected a folder or a file, there is no {source}")
    columns = columns or Columns()
    kind = kind or _kind_of(source)
    readers = {
        "folder": lambda: _read_folder(source),
        "csv": lambda: _read_table(_csv_rows(source, ","), columns, source.name),
        "tsv": lambda: _read_table(_csv_rows(source, "\t"), columns, source.name),
        "parquet": lambda: _read_table(_parquet_rows(source, columns), columns, source.name),
        "coco": lambda: _read_coco(source),
        "flickr30k": lambda: _read_flickr30k(source),
    }
    if kind not in readers:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}; got {kind!r}")
    pairs, broken = [], []
    for row in readers[kind]():
        (broken if isinstance(row, Broken) else pairs).append(row)
    return pairs, broken


def _kind_of(source: Path) -> Kind:
    if source.is_dir():
        return "folder"
    suffix = source.suffix.lower()
    known = {".parquet": "parquet", ".tsv": "tsv", ".json": "coco", ".token": "flickr30k"}
    if suffix in known:
        return known[suffix]
    if suffix in (".csv", ".txt"):
        with _open_text(source) as file:
            first = file.readline()
        if first.count("|") == 2:
            return "flickr30k"
        return "tsv" if "\t" in first and suffix == ".txt" else "csv"
    raise ValueError(
        f"source: cannot tell what {source.name} is; give its kind: {', '.join(KINDS)}"
    )


def _open_text(path: Path):
    """Text whose wrong bytes come through as lone surrogates, to be found row by row."""
    return open(path, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _pair(image: str, caption: str, identity: str | None, place: str) -> Pair | Broken:
    image, caption = image.strip(), caption.strip()
    if not image:
        return Broken(place, "no image path", caption[:80])
    if not caption:
        return Broken(place, "empty caption", image)
    for text in (image, caption, identity or ""):
        try:
            text.encode()
        except UnicodeEncodeError:
            return Broken(place, "not UTF-8", ascii(text)[:80])
    return Pair(image, caption, identity or Path(image).as_posix(), place)


def _read_folder(folder: Path) -> Iterator[Pair | Broken]:
    for root, folders, files in os.walk(folder):
        folders.sort()
        images = sorted(name for name in files if Path(name).suffix.lower() in IMAGE_SUFFIXES)
        stems = {Path(name).stem for name in images}
        for name in sorted(files):
            if name.endswith(".txt") and Path(name).stem not in stems:
                place = (Path(root) / name).relative_to(folder).as_posix()
                yield Broken(place, "no image", "a text file without an image of its name")
        for name in images:
            path = (Path(root) / name).relative_to(folder).as_posix()
            yield from _captions_beside(folder / path, path)


def _captions_beside(image: Path, path: str) -> Iterator[Pair | Broken]:
    captions = image.with_suffix(".txt")
    if not captions.is_file():
        yield Broken(path, "no caption", f"there is no {captions.name} beside it")
        return
    with _open_text(captions) as file:
        lines = [(number, line) for number, line in enumerate(file.read().split("\n"), 1)]
    lines = [(number, line) for number, line in lines if line.strip()]
    if not lines:
        yield Broken(path, "empty caption", captions.name)
    place = Path(path).with_suffix(".txt").as_posix()
    for number, line in lines:
        yield _pair(path, line, None, f"{place}, line {number}")


_Row = tuple[str, Sequence[object] | Broken]


def _csv_rows(path: Path, delimiter: str) -> Iterator[_Row]:
    """The place of each row and its fields; the first row is the header."""
    csv.field_size_limit(1 << 30)
    with _open_text(path) as file:
        reader = csv.reader(file, delimiter=delimiter)
        while True:
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                place = f"{path.name}, line {reader.line_num}"
                yield place, Broken(place, "malformed row", str(error))
                continue
            if row:
                yield f"{path.name}, line {reader.line_num}", row


def _parquet_rows(path: Path, columns: Columns) -> Iterator[_Row]:
    parquet = require("pyarrow.parquet", "parquet").ParquetFile(path)
    names = parquet.schema_arrow.names
    yield "header", names
    # Other columns may hold whole images.
    wanted = [name for name in _find_columns(names, columns, path.name) if name is not None]
    number = 0
    for batch in parquet.iter_batches(columns=wanted):
        for record in batch.to_pylist():
            number += 1
            yield f"{path.name}, row {number}", [record.get(name) for name in names]


def _read_table(rows: Iterator[_Row], columns: Columns, name: str) -> Iterator[Pair | Broken]:
    _, header = next(rows, ("", ()))
    if isinstance(header, Broken):
        raise ValueError(f"source: the header of {name} cannot be read: {header.detail}")
    header = [str(field).strip() for field in header]
    found = _find_columns(header, columns, name)
    places = [None if column is None else header.index(column) for column in found]
    for place, row in rows:
        if isinstance(row, Broken):
            yield row
        elif len(row) != len(header):
            detail = f"{len(row)} fields, the header has {len(header)}"
            yield Broken(place, "malformed row", detail)
        else:
            fields = ["" if at is None or row[at] is None else str(row[at]) for at in places]
            yield _pair(fields[0], fields[1], fields[2].strip() or None, place)


def _find_columns(header: list[str], columns: Columns, name: str) -> list[str | None]:
    """The names of the image, caption and id columns; None where there is no id."""
    wanted = (
        ("image", columns.image, _IMAGE_COLUMNS),
        ("caption", columns.caption, _CAPTION_COLUMNS),
        ("id", columns.id, _ID_COLUMNS),
    )
    found: list[str | None] = []
    for what, given, usual in wanted:
        if given is not None and given not in header:
            raise ValueError(
                f"{what} column: expected one of {', '.join(header) or 'no columns'} "
                f"of {name}; got {given!r}"
            )
        # The usual names are in order of preference.
        lowered = {column.lower(): column for column in reversed(header)}
        column = given or next((lowered[n] for n in usual if n in lowered), None)
        if column is None and what != "id":
            raise ValueError(
                f"{what} column: {name} has none of the usual names ({', '.join(usual)}) "
                f"among its columns ({', '.join(header)}); give its name"
            )
        found.append(column)
    return found


def _read_coco(path: Path) -> Iterator[Pair | Broken]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        images = {image["id"]: image["file_name"] for image in content["images"]}
        annotations = content["annotations"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'source: expected COCO captions, an object with "images" (id, file_name) and '
            f'"annotations" (image_id, caption); {path.name} is not: {error!r}'
        ) from error
    for number, annotation in enumerate(annotations, 1):
        place = f"{path.name}, annotation {number}"
        try:
            image, caption = annotation["image_id"], annotation["caption"]
        except (KeyError, TypeError) as error:
            yield Broken(place, "malformed row", f"{error!r}")
            continue
        if image not in images:
            yield Broken(place, "no image", f"there is no image with the id {image!r}")
        elif not isinstance(caption, str) or not isinstance(images[image], str):
            yield Broken(place, "malformed row", f"{images[image]!r}, {caption!r}"[:80])
        else:
            yield _pair(images[image], caption, str(image), place)


def _read_flickr30k(path: Path) -> Iterator[Pair | Broken]:
    with _open_text(path) as file:
        lines = file.read().split("\n")
    piped = lines[0].count("|") == 2
    for number, line in enumerate(lines, 1):
        line = line.rstrip("\r")
        if not line.strip() or (piped and number == 1):
            continue
        place = f"{path.name}, line {number}"
        # The caption is last and may hold the separator itself.
        fields = line.split("|", 2) if piped else line.split("\t", 1)
        if len(fields) != (3 if piped else 2):
            yield Broken(place, "malformed row", line[:80].encode(errors="replace").decode())
            continue
        image = fields[0].strip().rsplit("#", 1)[0]
        yield _pair(image, fields[-1], Path(image).stem, place)
