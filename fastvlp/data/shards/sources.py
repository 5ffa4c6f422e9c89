"""Image–caption pairs as people have them, read into one list.

    folder      images in any depth, each with a text file of the same name beside it, one caption
                per line; hidden files are passed over, linked folders read
    csv, tsv    a header, then a path, a caption and optionally an image id in each row
    parquet     the same columns, or images in the file itself as Hugging Face's data sets have
                them; a file or a folder of files (needs pyarrow)
    json        [{"image", "caption"}], one such object per line, or one of the next two
    coco        the JSON of COCO captions: "images" and "annotations"
    karpathy    Karpathy's splits of COCO and Flickr30k: "images" with "sentences" and "split"
    flickr30k   the token file (name#number, a tab, the caption) or the CSV parted by "|"

A row that cannot be used is set aside with its place and the reason, never silently lost. Whether
an image is there and can be decoded is not looked at here. All pairs are held in memory, images
not.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from fastvlp.data.shards.folder import read_folder
from fastvlp.data.shards.json import read_json
from fastvlp.data.shards.pairs import (
    IMAGE_SUFFIXES,
    Broken,
    Columns,
    Embedded,
    Pair,
    Rows,
    malformed,
    open_text,
    pair,
)
from fastvlp.data.shards.tables import read_parquet, read_text_table

__all__ = ["KINDS", "Broken", "Columns", "Embedded", "Kind", "Pair", "read_pairs"]

Kind = Literal["folder", "csv", "tsv", "parquet", "json", "coco", "karpathy", "flickr30k"]
KINDS: tuple[Kind, ...] = (
    "folder", "csv", "tsv", "parquet", "json", "coco", "karpathy", "flickr30k",
)  # fmt: skip
_BY_SUFFIX: dict[str, Kind] = {
    ".parquet": "parquet",
    ".tsv": "tsv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".token": "flickr30k",
}
_ARCHIVES = (".tar", ".tgz", ".zip", ".7z", ".rar")
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


def read_pairs(
    source: Path,
    kind: Kind | None = None,
    columns: Columns | None = None,
    *,
    quotes: bool | None = None,
    splits: Sequence[str] = (),
) -> tuple[list[Pair], list[Broken]]:
    """All pairs of ``source`` in its order, and the rows that are none.

    Args:
        source: a folder or a file.
        kind: one of KINDS; None to tell it from the name and the first line.
        columns: for CSV, TSV, parquet and lists in JSON.
        quotes: whether fields of CSV and TSV may be in quotes, which then may hold separators and
            line breaks. By default those of CSV may, and those of TSV not.
        splits: those wanted of a file of Karpathy's, which has several.

    Raises:
        FileNotFoundError: there is no such source.
        ValueError: its kind cannot be told, a column is missing, or the file as a whole is not of
            its kind.
    """
    if not source.exists():
        raise FileNotFoundError(f"source: expected a folder or a file, there is no {source}")
    columns = columns or Columns()
    kind = kind or _kind_of(source)
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}; got {kind!r}")
    if splits and kind not in ("json", "karpathy"):
        raise ValueError(f"split: expected none of a source of the kind {kind}; got {splits!r}")
    readers = {
        "folder": lambda: read_folder(source),
        "csv": lambda: read_text_table(source, ",", quotes is not False, columns),
        "tsv": lambda: read_text_table(source, "\t", quotes is True, columns),
        "parquet": lambda: read_parquet(_parquet_files(source), columns),
        "flickr30k": lambda: _read_flickr30k(source),
    }
    read = readers.get(kind, lambda: read_json(source, kind, columns, splits))
    pairs, broken = [], []
    for row in read():
        (broken if isinstance(row, Broken) else pairs).append(row)
    return pairs, broken


def _kind_of(source: Path) -> Kind:
    if source.is_dir():
        tables = any(source.glob("*.parquet"))
        images = tables and any(p.suffix.lower() in IMAGE_SUFFIXES for p in source.rglob("*"))
        return "parquet" if tables and not images else "folder"
    suffix = source.suffix.lower()
    if suffix in _BY_SUFFIX:
        return _BY_SUFFIX[suffix]
    if suffix in (".csv", ".txt"):
        with open_text(source) as file:
            first = file.readline()
        if first.count("|") == 2:
            return "flickr30k"
        return "tsv" if "\t" in first and suffix == ".txt" else "csv"
    if any(each.lower() in _ARCHIVES for each in source.suffixes[-2:]):
        raise ValueError(
            f"source: {source.name} is an archive; unpack it and give the folder. WebDataset "
            f"shards are data for training as they are (--data), where they are plain .tar files"
        )
    if suffix in _COMPRESSED:
        raise ValueError(f"source: {source.name} is compressed; decompress it first")
    raise ValueError(
        f"source: cannot tell what {source.name} is; give its kind (--kind): {', '.join(KINDS)}"
    )


def _parquet_files(source: Path) -> list[Path]:
    if not source.is_dir():
        return [source]
    files = sorted(source.glob("*.parquet"))
    if not files:
        raise ValueError(f"source: expected .parquet files in {source}; there are none")
    return files


def _read_flickr30k(path: Path) -> Rows:
    with open_text(path) as file:
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
            yield malformed(place, line[:80])
            continue
        image = fields[0].strip().rsplit("#", 1)[0]
        yield pair(image, fields[-1], Path(image).stem, place)
