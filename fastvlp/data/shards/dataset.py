"""A set of shards as one sequence of samples: their order in an epoch, and their content.

The order is a function of seed and epoch. It mixes shards first and then the samples of a window of
neighbouring shards, so that a slow disk sees a few shards at a time and an epoch of any size needs
the memory of one window. All ranks see the same order and take different places of it.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np

from fastvlp.data.optional import require
from fastvlp.data.rng import permutation
from fastvlp.data.shards.index import Fault, caption_in_json, index_of
from fastvlp.data.shards.pairs import IMAGE_SUFFIXES
from fastvlp.data.shards.tar import name_before

# Seconds between calls that tell of progress within shards.
_BEAT = 1.0
# Parts of a sample that lie within this many bytes are read at once.
_GAP = 1 << 16


@dataclass(frozen=True)
class RawSample:
    """A sample as it lies in its shard. ``index`` is its place in the unshuffled data set."""

    index: int
    shard: str
    image: bytes
    caption: str
    id: str | None


def expand(shards: str | os.PathLike | Sequence[str | os.PathLike]) -> list[str]:
    """Paths named by paths, folders, globs or brace patterns.

    Globs and folders are sorted, the rest keeps its order. Braces are those of bash and webdataset:
    ``{00..17}``, ``{17..00}`` backwards, ``{0..16..4}`` in steps, ``{a,b{0..3}}``. What is there
    under its name as written, braces or not, is that file or folder.

    Raises:
        FileNotFoundError: a path does not exist or a pattern matches nothing.
        ValueError: nothing is named, or a file twice.
    """
    given = [shards] if isinstance(shards, (str, os.PathLike)) else list(shards)
    found = [path for pattern in given for path in _expanded(os.fspath(pattern))]
    if not found:
        raise ValueError("shards: expected at least one path or pattern; got none")
    for path, count in Counter(found).items():
        if count > 1:
            raise ValueError(f"shards: named more than once: {path!r}")
    return found


def _expanded(pattern: str) -> Iterator[str]:
    literal, rest = _there(pattern)
    for choice in _braces(rest):
        path = literal + choice
        if os.path.isdir(path):
            matches = sorted(glob.glob(os.path.join(glob.escape(path), "*.tar")))
        elif os.path.exists(path):
            matches = [path]
        else:
            matches = sorted(glob.glob(glob.escape(literal) + choice))
        if not matches:
            raise FileNotFoundError(f"shards: {_nothing_at(path)}")
        yield from matches


def _there(pattern: str) -> tuple[str, str]:
    """The longest beginning of a pattern that is there as it is written, and the rest."""
    literal = pattern
    while literal and not os.path.exists(literal):
        shorter = os.path.dirname(literal)
        literal = shorter if shorter != literal else ""
    return literal, pattern[len(literal) :]


def _braces(pattern: str) -> Iterable[str]:
    if "{" not in pattern:
        return [pattern]
    library = require("braceexpand")
    try:
        return library.braceexpand(pattern, escape=False)
    except library.UnbalancedBracesError:  # a plain name, as bash has it
        return [pattern]


def _nothing_at(path: str) -> str:
    if not os.path.isdir(path):
        return f"nothing is there: {path!r}"
    packed = sorted(name for name in os.listdir(path) if re.search(r"\.(tgz|tar\.\w+)$", name))
    if packed:
        return (
            f"expected .tar files in {path!r}; {packed[0]!r} is compressed, as are {len(packed)} "
            f"in all: decompress them (gunzip), members are read at random"
        )
    inside = sorted({os.path.dirname(each) for each in glob.glob(f"{glob.escape(path)}/*/*.tar")})
    if inside:
        return f"expected .tar files in {path!r}; there are some in {' and '.join(inside)}"
    names = os.listdir(path)
    if any(name.lower().endswith(IMAGE_SUFFIXES) for name in names):
        return (
            f"expected .tar files in {path!r}; there are images, of which shards are made with: "
            f"fastvlp shards captions.csv SHARDS --images {path}"
        )
    return f"expected .tar files in {path!r}; there are none"


class ShardSet:
    """All good samples of some shards, numbered in the shards' order.

    Args:
        paths: the shards.
        decode: whether indexing decodes every image.
        cache_dir: the root of the index cache.
        threads: how many shards are indexed at once.
        start: the shard to begin with; ranks that begin at different ones share the work.
        progress: called with (shards done, shards) as indexing goes on; about every second also
            while it is within shards, whose scanned shares are counted.
    """

    def __init__(
        self,
        paths: Sequence[str],
        decode: bool = False,
        cache_dir: str | os.PathLike | None = None,
        threads: int = 1,
        start: int = 0,
        progress: Callable[[float, int], None] | None = None,
    ) -> None:
        self.paths = list(paths)
        scanned: dict[str, float] = {}
        self._load = lru_cache(maxsize=1024)(
            lambda path: index_of(path, decode, cache_dir, partial(scanned.__setitem__, path))
        )
        turn = start % max(1, len(self.paths))
        facts: dict[str, tuple[int, tuple[Fault, ...]]] = {}
        with ThreadPoolExecutor(threads) as pool:
            order = self.paths[turn:] + self.paths[:turn]
            futures = [pool.submit(self._load, path) for path in order]
            try:
                for path, future in zip(order, futures, strict=True):
                    while progress and wait([future], _BEAT).not_done:
                        others = [scanned.get(path, 0.0) for path in order if path not in facts]
                        progress(len(facts) + sum(others), len(order))
                    index = future.result()
                    facts[path] = len(index), index.faults
                    if progress:
                        progress(len(facts), len(order))
            finally:  # an error does not wait for the shards that nobody has begun
                for future in futures:
                    future.cancel()
        counts = [facts[path][0] for path in self.paths]
        self.faults = [fault for path in self.paths for fault in facts[path][1]]
        # Number of the first sample of each shard, and of all samples at the end.
        self.starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def fingerprint(self) -> str:
        """Changes with the shards' names, order and numbers of samples."""
        digest = hashlib.sha256()
        for path, start in zip(self.paths, self.starts[1:], strict=True):
            digest.update(f"{os.path.basename(path)}\0{start}\0".encode())
        return digest.hexdigest()[:16]

    def read(self, sample: int) -> RawSample:
        """One sample's content.

        Raises:
            OSError: the shard cannot be read or is not as it was when it was indexed.
        """
        path, entry = self._entry(sample)
        image, text, identity = _read_parts(path, [entry[0:2], entry[2:4], entry[4:6]])
        caption = _caption(path, entry, text)
        try:
            written = None if entry[5] < 0 else identity.decode()
        except ValueError as error:
            raise _changed(path, error) from error
        return RawSample(sample, path, image, caption, written)

    def captions(self, samples: Iterable[int]) -> Iterator[str]:
        """The captions of some samples, without reading their images; errors as in `read`."""
        for sample in samples:
            path, entry = self._entry(sample)
            yield _caption(path, entry, *_read_parts(path, [entry[2:4]]))

    def name(self, sample: int) -> tuple[str, str]:
        """A sample's shard and the name of its image there, for messages."""
        path, entry = self._entry(sample)
        try:
            with open(path, "rb") as file:
                return path, name_before(file, entry[0])
        except OSError:
            return path, f"number {sample - int(self.starts[self.paths.index(path)])}"

    def _entry(self, sample: int) -> tuple[str, list[int]]:
        shard = int(np.searchsorted(self.starts, sample, side="right")) - 1
        entry = self._load(self.paths[shard]).entries[sample - int(self.starts[shard])]
        return self.paths[shard], entry.tolist()


def _caption(path: str, entry: list[int], text: bytes) -> str:
    try:
        return caption_in_json(text) if entry[6] else text.decode()
    except ValueError as error:
        raise _changed(path, error) from error


def _changed(path: str, error: ValueError) -> OSError:
    return OSError(f"{path} is not as it was when it was indexed: {error}")


def _read_parts(path: str, ranges: list[list[int]]) -> list[bytes]:
    wanted = [(offset, size) for offset, size in ranges if size >= 0]
    begin = min(offset for offset, _ in wanted)
    end = max(offset + size for offset, size in wanted)
    with open(path, "rb", buffering=0) as file:
        if end - begin - sum(size for _, size in wanted) <= _GAP:
            block = _read_range(file, begin, end - begin)
            parts = [block[o - begin : o - begin + n] if n >= 0 else b"" for o, n in ranges]
        else:
            parts = [_read_range(file, o, n) if n >= 0 else b"" for o, n in ranges]
    return parts


def _read_range(file, offset: int, size: int) -> bytes:
    file.seek(offset)
    content = file.read(size)
    while len(content) < size:
        more = file.read(size - len(content))
        if not more:
            raise OSError(f"{file.name} is shorter than when it was indexed")
        content += more
    return content


class EpochOrder:
    """The samples of one epoch in their order, computed a window at a time.

    Args:
        starts: number of the first sample of each shard, and of all at the end.
        window: about how many samples are mixed with each other; 0 keeps the shards' order.
    """

    def __init__(self, starts: np.ndarray, seed: int, epoch: int, window: int) -> None:
        self._starts, self._seed, self._epoch = starts, seed, epoch
        self._shuffled = window > 0
        shards = len(starts) - 1
        self._shards = permutation(seed, epoch, 0, shards) if window else np.arange(shards)
        counts = np.diff(starts)[self._shards]
        ends = np.cumsum(counts)
        # A window is a run of whole shards: the last to begin within each `window` samples.
        number = (ends - counts) // window if window else np.arange(shards)
        first = np.flatnonzero(np.diff(number, prepend=-1))
        self._groups = np.append(first, shards)
        self._begins = np.append((ends - counts)[first], ends[-1] if shards else 0)
        self._cached: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def samples(self, begin: int, end: int) -> np.ndarray:
        """The samples at places ``begin`` to ``end`` of the epoch, int64."""
        pieces = [np.empty(0, np.int64)]
        while begin < end:
            window = int(np.searchsorted(self._begins, begin, side="right")) - 1
            stop = min(end, int(self._begins[window + 1]))
            pieces.append(self._window(window)[begin - self._begins[window] :][: stop - begin])
            begin = stop
        return np.concatenate(pieces)

    def _window(self, window: int) -> np.ndarray:
        if self._cached[0] != window:
            shards = self._shards[self._groups[window] : self._groups[window + 1]]
            found = [np.arange(self._starts[s], self._starts[s + 1]) for s in shards]
            samples = np.concatenate(found)
            if self._shuffled:
                samples = samples[permutation(self._seed, self._epoch, window + 1, len(samples))]
            self._cached = window, samples
        return self._cached[1]
