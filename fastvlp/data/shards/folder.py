"""A folder of images in any depth, each with a text file of its name beside it."""

from __future__ import annotations

import os
from pathlib import Path

from fastvlp.data.shards.folder_walk import Unread, walk
from fastvlp.data.shards.pairs import IMAGE_SUFFIXES, Broken, Rows, open_text, pair
from fastvlp.data.shards.stray_files import is_about, is_hidden


def read_folder(folder: Path) -> Rows:
    """The pairs of a folder in the order of their names; linked folders come last.

    Every folder is read once, whatever links lead to it; the other links to it are named.

    Raises:
        ValueError: it holds files, and none that this reads.
    """
    others, empty = [], True
    for found in walk(folder):
        if isinstance(found, Unread):
            rows = iter([Broken(_place(found.path, folder), found.fault, found.detail)])
        else:
            rows = _files(*found, folder, others)
        for row in rows:
            empty = False
            yield row
    if empty and others:
        raise ValueError(
            f"source: expected images ({', '.join(IMAGE_SUFFIXES)}) with text files beside them; "
            f"{folder} has none, but {len(others)} other files, the first {others[0]}. Where that "
            f"is a list of pairs, give it in place of the folder"
        )


def _files(root: Path, files: list[str], folder: Path, others: list[str]) -> Rows:
    files = [name for name in files if not is_hidden(name)]
    images = [name for name in files if Path(name).suffix.lower() in IMAGE_SUFFIXES]
    known, stems = set(images), {Path(name).stem for name in images}
    for name in files:
        place = _place(root / name, folder)
        if name.endswith(".txt") and Path(name).stem not in stems and not is_about(name):
            yield Broken(place, "no image", "a text file without an image of its name")
        elif name not in known:
            others.append(place)
            if not (root / name).exists():
                yield Broken(place, "dead link", f"it leads to {os.path.realpath(root / name)}")
    for name in images:
        yield from _captions_beside(root / name, _place(root / name, folder))


def _place(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _captions_beside(image: Path, path: str) -> Rows:
    captions = image.with_suffix(".txt")
    if not captions.is_file():
        yield Broken(path, "no caption", f"there is no {captions.name} beside it")
        return
    with open_text(captions) as file:
        lines = [(number, line) for number, line in enumerate(file.read().split("\n"), 1)]
    lines = [(number, line) for number, line in lines if line.strip()]
    if not lines:
        yield Broken(path, "empty caption", captions.name)
    place = Path(path).with_suffix(".txt").as_posix()
    for number, line in lines:
        yield pair(path, line, None, f"{place}, line {number}")
