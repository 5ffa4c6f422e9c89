"""Shards from a list of pairs: shuffled, checked, and the same whether or not it was interrupted.

The shuffled list is cut into shards before anything is read, so what a shard holds depends on its
own rows only: a broken image makes its shard smaller and moves nothing. Finished shards are written
down in a journal; a later call with the same pairs and options keeps those whose bytes are still as
recorded and makes the others.

    shard-000000.tar ...   members KEY.jpg (or png, webp, bmp), KEY.txt and KEY.id; image files are
                           copied as they are, and an image with several captions is in several
                           samples of one id
    manifest.json          the options, every shard's count, size and digest, all counts
    broken.tsv             place, fault and particulars of every row that gave no sample
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from fastvlp.data.images import integrity as image_check
from fastvlp.data.optional import require
from fastvlp.data.shards.images import ImageReader, image_reader, look_for
from fastvlp.data.shards.pairs import Broken, Pair
from fastvlp.data.shards.write import (
    Sample,
    ShardRecord,
    atomic_file,
    remove_partial_files,
    write_shard,
)
from fastvlp.masking import sample_keys

# Raise when equal options come to give other bytes.
_FORMAT = 1
_MANIFEST, _JOURNAL, _BROKEN = "manifest.json", ".journal.jsonl", "broken.tsv"
_EXTENSIONS = {
    "JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "GIF": "gif",
    "TIFF": "tif", "PPM": "ppm",
}  # fmt: skip


class TooManyBrokenError(ValueError):
    """More rows are broken than allowed."""


@dataclass(frozen=True)
class Result:
    """What was made: the shards in order, and every broken row."""

    folder: Path
    shards: tuple[ShardRecord, ...]
    broken: tuple[Broken, ...]

    @property
    def count(self) -> int:
        """Number of samples."""
        return sum(shard.count for shard in self.shards)

    @property
    def faults(self) -> dict[str, int]:
        """How many rows are broken by each fault, the most frequent first."""
        return dict(Counter(row.fault for row in self.broken).most_common())


def make_shards(
    pairs: list[Pair],
    broken: list[Broken],
    images: Path,
    folder: Path,
    *,
    per_shard: int = 1000,
    seed: int = 0,
    check: bool = True,
    max_broken: float = 0.1,
    most_broken: int | None = None,
    retry_broken: bool = False,
    allow_outside: bool = False,
    workers: int = 0,
    advance: Callable[[int, int], None] = lambda rows, broken: None,
) -> Result:
    """Write ``pairs`` to shards in ``folder``, or finish what an earlier call began.

    Args:
        pairs, broken: from ``pair_sources.read_pairs``.
        images: folder that relative paths of images start from, and that all images lie in.
        folder: made if it is not there. Images that lie in parquet files are copied to a temporary
            file there while it goes on.
        per_shard: rows of a shard, of which broken ones give no sample.
        seed: of the order.
        check: decode every image. Otherwise only its header is read.
        max_broken: largest share of all rows that may be broken.
        most_broken: the largest number of them in place of a share, where these are a part of more.
        retry_broken: make finished shards with broken rows again, after images were mended.
        allow_outside: read images outside of ``images``, by absolute paths and "..", as well. A
            source that others made can name any file of this machine so.
        workers: threads that read and check images; 0 for one per CPU.
        advance: told how many rows are done and how many of them were broken, as it goes.

    Raises:
        TooManyBrokenError: ``max_broken`` or ``most_broken`` is exceeded, or no row is good; what
            is finished is kept.
        ValueError: there are no pairs, none of some images that are looked for is there,
            ``folder`` is a file or holds shards of other pairs or options, or an option is out of
            range.
        BlockingIOError: another process is at work in ``folder``.
    """
    if per_shard < 1:
        raise ValueError(f"per_shard: expected a positive number; got {per_shard}")
    if not 0 <= max_broken <= 1:
        raise ValueError(f"max_broken: expected 0 to 1; got {max_broken}")
    if workers < 0:
        raise ValueError(f"workers: expected 0 or more; got {workers}")
    recipe = {
        "format": _FORMAT,
        "pairs": _digest(pairs, broken),
        "per_shard": per_shard,
        "seed": seed,
        "check": check,
    }
    allowed = max_broken * (len(pairs) + len(broken)) if most_broken is None else most_broken
    _check_broken(broken, allowed)
    if not pairs:
        raise ValueError(f"pairs: expected at least one; the source has none{_first(broken)}")
    make_folder(folder)
    with _only_process(folder):
        remove_partial_files(folder)
        # Where images may lie is no part of the result, but rows broken for that must not be kept.
        where = f"{images.resolve()}{' and outside' if allow_outside else ''}"
        journal = _Journal.open(folder, {**recipe, "images": where}, retry_broken)
        if not journal.finished:  # else the folder is the right one, whatever is left
            look_for(pairs, images, allow_outside)
        order = sample_keys(seed, torch.arange(len(pairs))).argsort(stable=True).tolist()
        parts = {
            f"shard-{number:06d}.tar": range(len(pairs))[start : start + per_shard]
            for number, start in enumerate(range(0, len(pairs), per_shard))
        }
        left = sorted(order[i] for name in parts.keys() - journal.finished for i in parts[name])
        faulty = list(broken)
        records = []
        with (
            image_reader([pairs[i] for i in left], images, allow_outside, folder) as reader,
            ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool,
        ):
            for name, places in parts.items():
                done = journal.finished.get(name)
                if done is None:
                    bad: list[Broken] = []
                    keyed = [(f"{i:09d}", pairs[order[i]]) for i in places]
                    samples = _samples(keyed, reader, check, bad, pool, advance)
                    done = (write_shard(folder / name, samples), bad)
                    journal.add(*done)
                else:
                    advance(len(places), len(done[1]))
                records.append(done[0])
                faulty += done[1]
                _check_broken(faulty, allowed)
        result = Result(folder, tuple(records), tuple(faulty))
        if not result.count:
            raise TooManyBrokenError(f"pairs: none of {len(faulty)} rows is good{_first(faulty)}")
        _finish(result, recipe)
    return result


def make_folder(folder: Path) -> None:
    """Make the folder of shards, and those above it, where it is not there.

    Raises:
        ValueError: it is a file, or lies in one.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(
            f"folder: expected a folder for the shards; {error.filename} is a file, choose another"
        ) from error


def _samples(
    keyed: list[tuple[str, Pair]],
    reader: ImageReader,
    check: bool,
    bad: list[Broken],
    pool: Executor,
    advance: Callable[[int, int], None],
) -> Iterator[Sample]:
    """The good samples in order; broken ones are added to ``bad``."""
    for key, pair, loaded in _ahead(keyed, reader, check, pool):
        if isinstance(loaded, Broken):
            bad.append(loaded)
            advance(1, 1)
            continue
        extension, content = loaded
        identity = pair.id or hashlib.sha256(content).hexdigest()[:32]
        members = {extension: content, "txt": pair.caption.encode(), "id": identity.encode()}
        yield Sample(key, members)
        advance(1, 0)


def _ahead(
    keyed: Iterable[tuple[str, Pair]], reader: ImageReader, check: bool, pool: Executor
) -> Iterator[tuple[str, Pair, tuple[str, bytes] | Broken]]:
    """Every row with its image, read by the pool a few dozen rows ahead."""
    waiting = deque()
    for key, pair in keyed:
        waiting.append((key, pair, pool.submit(_load, pair, reader, check)))
        if len(waiting) > 64:
            key, pair, future = waiting.popleft()
            yield key, pair, future.result()
    for key, pair, future in waiting:
        yield key, pair, future.result()


def _load(pair: Pair, reader: ImageReader, check: bool) -> tuple[str, bytes] | Broken:
    """Extension and bytes of an image, or what is wrong with it."""
    content = reader.read(pair)
    if isinstance(content, Broken):
        return content
    pillow = require("PIL.Image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pillow.open(io.BytesIO(content)) as image:
                extension = _EXTENSIONS.get(image.format)
                if extension is None:
                    detail = f"{pair.image}: {image.format}; convert it to JPEG or PNG"
                    return Broken(pair.place, "image format", detail)
        if check:
            image_check.open_rgb(content)
    except image_check.ImageFault as fault:
        return Broken(pair.place, "image cannot be decoded", f"{pair.image}: {fault}")
    except MemoryError:
        raise
    except Exception as error:  # damaged files make Pillow raise nearly anything
        reason = "not an image" if isinstance(error, pillow.UnidentifiedImageError) else repr(error)
        return Broken(pair.place, "image cannot be decoded", f"{pair.image}: {reason}")
    return extension, content


def _check_broken(broken: list[Broken], allowed: float) -> None:
    if len(broken) > allowed:
        raise TooManyBrokenError(
            f"max_broken: expected at most {int(allowed)} broken rows; got {len(broken)} so far"
            f"{_first(broken)}\n"
            f"Mend them and retry broken rows (--retry-broken), or allow more (--max-broken)"
        )


def _first(broken: list[Broken]) -> str:
    rows = (f"\n  {row.place}: {row.fault}: {row.detail}" for row in broken[:5])
    return f". The first:{''.join(rows)}" if broken else ""


@dataclass
class _Journal:
    """Finished shards, one JSON line each, after a line with the recipe."""

    folder: Path
    finished: dict[str, tuple[ShardRecord, list[Broken]]]

    @classmethod
    def open(cls, folder: Path, recipe: dict, retry_broken: bool) -> _Journal:
        path = folder / _JOURNAL
        lines = []
        if path.exists():
            for line in path.read_bytes().split(b"\n"):
                try:
                    lines.append(json.loads(line))
                except ValueError:  # the last one, when the process was killed as it wrote
                    break
        if len(lines) == 1 and not any(folder.glob("*.tar")):
            lines = []  # nothing was made yet, so that nothing is mixed
        if lines and lines[0] != recipe:
            differing = [key for key in recipe if lines[0].get(key) != recipe[key]]
            raise ValueError(
                f"folder: {folder} holds shards made from other {', '.join(differing)}; "
                f"choose another folder, or remove that one"
            )
        if not lines and any(folder.glob("*.tar")):
            raise ValueError(
                f"folder: {folder} holds tar files of another origin; choose another folder"
            )
        finished = {}
        for line in lines[1:]:
            record = ShardRecord(**line["shard"])
            if record.matches(folder) and not (retry_broken and line["broken"]):
                finished[record.name] = (record, [Broken(*row) for row in line["broken"]])
        journal = cls(folder, finished)
        # Written anew, so that a torn line or a shard that is gone does not stay in it.
        with atomic_file(path) as file:
            file.write(_line(recipe))
            for record, broken in finished.values():
                file.write(_entry(record, broken))
        return journal

    def add(self, record: ShardRecord, broken: list[Broken]) -> None:
        """Write down that a shard is finished; on the disk when this returns."""
        with open(self.folder / _JOURNAL, "ab") as file:
            file.write(_entry(record, broken))
            file.flush()
            os.fsync(file.fileno())


def _entry(record: ShardRecord, broken: list[Broken]) -> bytes:
    rows = [[row.place, row.fault, row.detail] for row in broken]
    return _line({"shard": asdict(record), "broken": rows})


def _line(content: dict) -> bytes:
    return json.dumps(content).encode() + b"\n"


def _finish(result: Result, recipe: dict) -> None:
    with atomic_file(result.folder / _BROKEN) as file:
        file.write(b"place\tfault\tdetail\n")
        for row in result.broken:
            fields = (row.place, row.fault, row.detail)
            file.write("\t".join(" ".join(field.split()) for field in fields).encode() + b"\n")
    manifest = {
        "recipe": recipe,
        "samples": result.count,
        "broken": result.faults,
        "shards": [asdict(record) for record in result.shards],
    }
    with atomic_file(result.folder / _MANIFEST) as file:
        file.write(json.dumps(manifest, indent=2).encode())


def _digest(pairs: list[Pair], broken: list[Broken]) -> str:
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(json.dumps([pair.image, pair.caption, pair.id, pair.place]).encode())
    for row in broken:
        digest.update(json.dumps([row.place, row.fault, row.detail]).encode())
    return digest.hexdigest()


@contextmanager
def _only_process(folder: Path) -> Iterator[None]:
    filelock = require("filelock")
    try:
        with filelock.FileLock(folder / ".lock", timeout=0):
            yield
    except filelock.Timeout as error:
        raise BlockingIOError(f"folder: another process is making shards in {folder}") from error
