"""Which columns of a table hold images, captions and ids, and the pairs of one row of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastvlp.data.shards.pairs import Columns, Embedded, Rows, malformed, pair

_IMAGE_COLUMNS = ("path", "filepath", "file_path", "image_path", "image", "image_name")
_IMAGE_COLUMNS += ("file_name", "filename", "file")
_CAPTION_COLUMNS = ("caption", "title", "text", "sentence", "comment", "captions")
_ID_COLUMNS = ("image_id",)


def find_columns(header: Sequence[str], columns: Columns, name: str) -> list[str | None]:
    """The names of the image, caption and id columns; None where there is no id.

    Raises:
        ValueError: there is no such column; ``name`` is the file's for the message.
    """
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
                f"among its columns ({', '.join(header)}); give its name (--{what}-column)"
            )
        found.append(column)
    return found


def is_usual(name: str) -> bool:
    """Whether columns of images often have this name."""
    return name.lower() in _IMAGE_COLUMNS


def row_pairs(
    place: str, image: Any, caption: Any, identity: Any, embedded: Embedded | None = None
) -> Rows:
    """The pairs of one row, several where it has a list of captions."""
    path, name = _text(image), _text(identity)
    captions = caption if isinstance(caption, list) else [caption]
    if path is None or name is None:
        what, value = ("image", image) if path is None else ("id", identity)
        yield malformed(place, f"{what}: expected text; got {value!r:.80}")
        return
    for each in captions or [""]:
        text = _text(each)
        if text is None:
            yield malformed(place, f"caption: expected text or a list of texts; got {each!r:.80}")
        else:
            yield pair(path, text, name, place, embedded)


def _text(value: Any) -> str | None:
    """A field as text, "" where it is missing, None where it is no text."""
    if value is None or value != value:  # NaN: pandas' missing value
        return ""
    return str(value) if isinstance(value, (str, int, float)) else None
