"""Tables of pairs: CSV, TSV and parquet.

CSV is read as RFC 4180 has it: a field in quotes may hold commas, line breaks and doubled quotes.
A quote that is not closed so costs its own line, and the next line is read on its own. Files of
tab-separated values are made without quoting, so that there a quote is a character like any other.
"""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from fastvlp.data.optional import require
from fastvlp.data.shards.columns import find_columns, is_usual, row_pairs
from fastvlp.data.shards.pairs import IMAGE_SUFFIXES, Columns, Embedded, Rows, malformed, open_text

# Characters of one record of several lines. A quote that is open for longer is not closed.
_LONGEST_RECORD = 1 << 20


def read_text_table(path: Path, delimiter: str, quoted: bool, columns: Columns) -> Rows:
    """The pairs of a file whose first line names its columns.

    Args:
        quoted: whether fields may be in quotes, as in CSV.

    Raises:
        ValueError: the first line cannot be read, or names no column of images or captions.
    """
    with open_text(path) as file:
        records = _Records(file, delimiter, quoted)
        rows = iter(records)
        _, header = next(rows, (1, []))
        if isinstance(header, str):
            raise ValueError(f"source: the header of {path.name} cannot be read: {header}")
        header = [field.strip() for field in header]
        found = find_columns(header, columns, path.name)
        places = [None if column is None else header.index(column) for column in found]
        records.width, records.image_column = len(header), places[0]
        for line, row in rows:
            place = f"{path.name}, line {line}"
            if isinstance(row, str):
                yield malformed(place, row)
            elif len(row) != len(header):
                yield malformed(place, f"{len(row)} fields, the header has {len(header)}")
            else:
                yield from row_pairs(place, *(None if at is None else row[at] for at in places))


class _Records:
    """The records of a text: the number of each one's first line, and its fields or its fault.

    Attributes:
        width, image_column: the number of fields, and which of them holds paths of images, for
            records after the header.
    """

    def __init__(self, lines: Iterator[str], delimiter: str, quoted: bool) -> None:
        self._lines, self._delimiter, self._quoted = lines, delimiter, quoted
        self._waiting: deque[str] = deque()  # lines that were read and given back
        self.width = self.image_column = 0
        csv.field_size_limit(max(csv.field_size_limit(), 2 * _LONGEST_RECORD))

    def __iter__(self) -> Iterator[tuple[int, list[str] | str]]:
        number = 1
        while line := self._next_line():
            if not line.strip("\r\n"):
                number += 1
            elif not self._quoted or '"' not in line:
                yield number, line.rstrip("\r\n").split(self._delimiter)
                number += 1
            else:
                taken: list[str] = []
                yield number, self._record(line, taken)
                number += len(taken)

    def _next_line(self) -> str:
        return self._waiting.popleft() if self._waiting else next(self._lines, "")

    def _record(self, first: str, taken: list[str]) -> list[str] | str:
        """One record; the lines that it is made of are in ``taken`` afterwards."""

        def lines() -> Iterator[str]:
            line, size = first, 0
            while line and size <= _LONGEST_RECORD:
                taken.append(line)
                yield line
                size += len(line)
                line = self._next_line()
            self._waiting.extendleft([line] if line else [])

        feed = lines()
        try:
            row = next(csv.reader(feed, delimiter=self._delimiter, strict=True))
            reason = self._swallowed(row) if self.width and len(taken) > 1 else ""
        except csv.Error as error:
            reason = str(error)
        feed.close()
        if not reason:
            return row
        self._waiting.extendleft(reversed(taken[1:]))
        del taken[1:]
        return f"a field whose quotes are not closed as in CSV ({reason}): {first.strip()}"

    def _swallowed(self, row: list[str]) -> str:
        """Why a record of several lines seems to hold other rows in a field, or ""."""
        at = self.image_column
        if len(row) != self.width:
            return f"{len(row)} fields with the lines after it, the header has {self.width}"
        if "\n" in row[at]:
            return "the path would be of several lines"
        for number, field in enumerate(row):
            first, *more = (line.split(self._delimiter) for line in field.split("\n"))
            # The rest of the first line would be fields of this row, each later line a row.
            for fields in [[""] * (number + 1) + first[1:], *more] if more else []:
                if at < len(fields) and _is_image(fields[at]):
                    return f"{fields[at].strip()} would be a part of it"
        return ""


def _is_image(field: str) -> bool:
    return field.strip().lower().endswith(IMAGE_SUFFIXES)


def read_parquet(paths: Sequence[Path], columns: Columns) -> Rows:
    """The pairs of parquet files, whose images are paths, or lie in the files themselves.

    A column of images is of bytes, or of ``{bytes, path}`` as Hugging Face's data sets have it.

    Raises:
        ValueError: a file is damaged, or has no column of images or captions.
    """
    for path in paths:
        with naming_damage(path):
            yield from _read_parquet(path, columns)


@contextmanager
def naming_damage(path: str | Path) -> Iterator[None]:
    """What pyarrow finds wrong inside a parquet file becomes a ValueError that names the file."""
    try:
        yield
    except (require("pyarrow", "parquet").ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the file system
            raise
        reason = str(error).partition("\n")[0][:160]
        raise ValueError(
            f"source: {path} is no parquet file, is damaged, or is cut short ({reason}); fetch or "
            "write it again"
        ) from error


def _read_parquet(path: Path, columns: Columns) -> Rows:
    parquet = require("pyarrow.parquet", "parquet").ParquetFile(path)
    schema = parquet.schema_arrow
    if columns.image is None:
        # Beside the images there may be names of the files that they once were.
        whole = (name for name in schema.names if _embeds(schema.field(name).type)[0])
        columns = replace(columns, image=next((n for n in whole if is_usual(n)), None))
    image, caption, identity = find_columns(schema.names, columns, path.name)
    kind = schema.field(image).type
    inside, path_inside = _embeds(kind)
    # Whole images, here and in other columns, are not read yet.
    of_image = ([f"{image}.path"] if path_inside else []) if inside else [image]
    wanted = [*of_image, caption, *([identity] if identity else [])]
    number = 0
    for batch in parquet.iter_batches(columns=wanted):
        for record in batch.to_pylist():
            place = f"{path.name}, row {number + 1}"
            value, embedded = record.get(image), None
            if inside:
                value = (value or {}).get("path") or place
                embedded = Embedded(str(path), image, number)
            named = record[identity] if identity else None
            yield from row_pairs(place, value, record[caption], named, embedded)
            number += 1


def _embeds(kind) -> tuple[bool, bool]:
    """Whether a column of this type holds whole images, and whether paths besides."""
    types = require("pyarrow.types", "parquet")
    if types.is_binary(kind) or types.is_large_binary(kind):
        return True, False
    fields = [kind.field(i).name for i in range(kind.num_fields)] if types.is_struct(kind) else []
    return "bytes" in fields, "path" in fields
