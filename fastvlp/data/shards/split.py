"""Pairs divided into training and validation by image, so that no image is in both."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fastvlp.data.shards.images import ImageReader, image_reader, look_for
from fastvlp.data.shards.pairs import Broken, Pair


def split_by_image(
    pairs: Sequence[Pair],
    share: float,
    images: Path,
    folder: Path,
    *,
    seed: int = 0,
    allow_outside: bool = False,
    workers: int = 0,
    advance: Callable[[int], None] = lambda rows: None,
) -> tuple[list[Pair], list[Pair]]:
    """The pairs for training and those for validation, each in the order of ``pairs``.

    Pairs are of one image where they name the same file, have the same id, or where the bytes of
    their files are equal. Which images are for training is a function of their bytes and of the
    seed alone: other names, another order of the rows and other captions change nothing. Every
    image is read once.

    Args:
        pairs: from ``read_pairs``.
        share: of the images, for training; more than 0 and less than 1. Each side has at least one.
        images: folder that relative paths start from.
        folder: where a temporary copy of images that lie in parquet files may be made.
        seed: of the choice.
        allow_outside: read images outside of ``images``.
        workers: threads that read; 0 for one per CPU.
        advance: told how many more rows are read.

    Raises:
        ValueError: the share is out of range, there are fewer than two images, or none of some
            images that are looked for is there.

    Examples:
        >>> from PIL import Image
        >>> Image.new("RGB", (8, 8), "red").save("red.png")
        >>> Image.new("RGB", (8, 8), "blue").save("blue.png")
        >>> pairs = [Pair(f"{name}.png", name, "", "") for name in ("red", "blue", "red")]
        >>> train, val = split_by_image(pairs, 0.5, Path("."), Path("."))
        >>> len(train) + len(val), {pair.image for pair in train} & {pair.image for pair in val}
        (3, set())
    """
    if not 0 < share < 1:
        raise ValueError(f"share: expected more than 0 and less than 1; got {share}")
    look_for(pairs, images, allow_outside)
    with image_reader(pairs, images, allow_outside, folder) as reader:
        digests = _digests(pairs, reader, workers or os.cpu_count() or 1, advance)
    groups = _groups(pairs, digests)
    if len(groups) < 2:
        raise ValueError(
            f"share: expected at least 2 images to divide; got {len(groups)} in {len(pairs)} rows"
        )
    ordered = sorted(groups.items(), key=lambda group: _place(group[0], seed))
    count = min(max(1, round(share * len(groups))), len(groups) - 1)
    chosen = {row for _, rows in ordered[:count] for row in rows}
    train = [pair for row, pair in enumerate(pairs) if row in chosen]
    return train, [pair for row, pair in enumerate(pairs) if row not in chosen]


def _place(name: str, seed: int) -> str:
    """By which groups are ordered; nothing of a name shows in it."""
    return hashlib.sha256(f"{seed} {name}".encode()).hexdigest()


def _digests(
    pairs: Sequence[Pair], reader: ImageReader, workers: int, advance: Callable[[int], None]
) -> list[str]:
    """Of each row's image; its name where it cannot be read, which the shards will report."""

    def digest(pair: Pair) -> str:
        content = reader.read(pair)
        if isinstance(content, Broken):
            return f"name {pair.image}"
        return hashlib.sha256(content).hexdigest()

    # Captions of one file lie in several rows; it is read once.
    first = {pair.embedded or pair.image: pair for pair in pairs}
    rows = dict.fromkeys(first, 0)
    for pair in pairs:
        rows[pair.embedded or pair.image] += 1
    found = {}
    with ThreadPoolExecutor(workers) as pool:
        for key, value in zip(first, pool.map(digest, first.values()), strict=True):
            found[key] = value
            advance(rows[key])
    return [found[pair.embedded or pair.image] for pair in pairs]


def _groups(pairs: Sequence[Pair], digests: Sequence[str]) -> dict[str, list[int]]:
    """Rows that share a digest or an id, directly or by others, under the least of their digests.

    A union-find over the rows.
    """
    parent = list(range(len(pairs)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = row = parent[parent[row]]
        return row

    first: dict[tuple[str, str], int] = {}
    for row, (pair, digest) in enumerate(zip(pairs, digests, strict=True)):
        for key in (("digest", digest), *([("id", pair.id)] if pair.id else [])):
            parent[root(row)] = root(first.setdefault(key, row))
    members: dict[int, list[int]] = {}
    for row in range(len(pairs)):
        members.setdefault(root(row), []).append(row)
    return {min(digests[row] for row in rows): rows for rows in members.values()}
