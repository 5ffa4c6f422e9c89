"""The bytes of the images that pairs name: files below one folder, or out of parquet files."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fastvlp.data.optional import require
from fastvlp.data.shards.pairs import Broken, Embedded, Pair
from fastvlp.data.shards.tables import naming_damage
from fastvlp.data.shards.write import temporary_file

# How many images are looked for, until one is there, to see whether the folder is the right one.
_LOOKED_FOR = 1000
# Rows of a parquet file, with their images, that are in memory at once.
_ROWS = 64


class ImageReader:
    """Reads the images of pairs; made by `image_reader`, called from several threads at once."""

    def __init__(self, images: Path, allow_outside: bool, copies: _Copies | None) -> None:
        self._images, self._allow_outside, self._copies = images, allow_outside, copies

    def read(self, pair: Pair) -> bytes | Broken:
        """The bytes of an image, or why there are none."""
        try:
            content = self._copies.read(pair.embedded) if pair.embedded else None
            return content or _file(self._images, pair.image, self._allow_outside).read_bytes()
        except _OutsideError as error:
            return Broken(pair.place, "image outside the folder", str(error))
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            reason = error.strerror if isinstance(error, OSError) else str(error)
            return Broken(pair.place, "image cannot be read", f"{pair.image}: {reason}")


@contextmanager
def image_reader(
    pairs: Sequence[Pair], images: Path, allow_outside: bool, folder: Path
) -> Iterator[ImageReader]:
    """A reader of the images of ``pairs``.

    Shuffled reading would decode a part of a parquet file for every image, so embedded images are
    first copied to a temporary file in ``folder``.

    Args:
        images: the folder that paths start from, and outside of which nothing is read unless
            ``allow_outside``.

    Raises:
        ValueError: a parquet file is damaged.
    """
    embedded = {pair.embedded for pair in pairs if pair.embedded}
    if not embedded:
        yield ImageReader(images, allow_outside, None)
        return
    with temporary_file(folder / "images") as path:
        yield ImageReader(images, allow_outside, _Copies(path, embedded))


class _OutsideError(ValueError):
    """A path leads out of the folder of images."""


def _file(images: Path, image: str, allow_outside: bool) -> Path:
    """The file of an image. Links are followed; ".." is resolved in the path as it is written."""
    root = os.path.abspath(images)
    path = os.path.normpath(os.path.join(root, image))
    inside = path.startswith(root.rstrip(os.sep) + os.sep)
    if not inside and not allow_outside:
        raise _OutsideError(
            f"{image} leads out of {images}; give the folder that holds all images (--images), or "
            f"allow it where the source is to be trusted (--allow-outside)"
        )
    return Path(path)


def look_for(pairs: Sequence[Pair], images: Path, allow_outside: bool) -> None:
    """Tells early that ``images`` is not the folder that the images of ``pairs`` lie in.

    Raises:
        ValueError: none of some images that were looked for is there.
    """
    named = [pair.image for pair in pairs if not pair.embedded]
    some = named[:: max(1, len(named) // _LOOKED_FOR)][:_LOOKED_FOR]
    missing, outside = [], []
    for image in some:
        try:
            path = _file(images, image, allow_outside)
            if os.path.exists(path):
                return
            missing.append((image, path))
        except _OutsideError as error:
            outside.append(error)
    if missing:
        image, path = missing[0]
        raise ValueError(
            f"images: none of {len(some)} images that were looked for is there, the first {path}. "
            f"Give the folder that paths start from (--images){_suggestion(images, image)}"
        )
    if outside:
        raise ValueError(f"images: {outside[0]}. All {len(some)} that were looked for lead out")


def _suggestion(images: Path, image: str) -> str:
    """A folder nearby that has the image, as the end of a sentence."""
    near = sorted(path for path in images.glob("*") if path.is_dir()) if images.is_dir() else []
    for folder in (*near, *images.absolute().parents):
        if os.path.isfile(folder / image):
            return f", perhaps {folder}"
    return "" if images.is_dir() else f"; there is no folder {images}"


class _Copies:
    """Images out of parquet files, one after another in a file of their own."""

    def __init__(self, path: Path, wanted: set[Embedded]) -> None:
        self._path = path
        self._ranges: dict[Embedded, tuple[int, int]] = {}
        rows: dict[tuple[str, str], set[int]] = defaultdict(set)
        for each in wanted:
            rows[each.file, each.column].add(each.row)
        with open(path, "wb") as file:
            for (source, column), numbers in sorted(rows.items()):
                with naming_damage(source):
                    for number, content in _contents(source, column, numbers):
                        self._ranges[Embedded(source, column, number)] = file.tell(), len(content)
                        file.write(content)

    def read(self, image: Embedded) -> bytes | None:
        """The bytes of an image; None or b"" where its row holds none."""
        if image not in self._ranges:
            return None
        offset, size = self._ranges[image]
        with open(self._path, "rb") as file:
            file.seek(offset)
            return file.read(size)


def _contents(source: str, column: str, rows: set[int]) -> Iterator[tuple[int, bytes]]:
    """Row numbers and images of the wanted rows that hold one."""
    file = require("pyarrow.parquet", "parquet").ParquetFile(source)
    first = 0
    for group in range(file.num_row_groups):
        end = first + file.metadata.row_group(group).num_rows
        number = first
        if any(row in rows for row in range(first, end)):
            for batch in file.iter_batches(_ROWS, row_groups=[group], columns=[column]):
                for image in batch.column(0):
                    if number in rows and (content := _bytes(image.as_py())):
                        yield number, content
                    number += 1
        first = end


def _bytes(image: bytes | dict | None) -> bytes | None:
    return image.get("bytes") if isinstance(image, dict) else image
