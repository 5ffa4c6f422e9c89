"""From WebDataset shards to batches of images and token ids.

    loader = Loader("shards/{0000..0017}.tar", "clip_train", 256, tokenizer, seed=1)
    for batch in loader:  # one epoch
        step(batch.images, batch.tokens)

Order and augmentation are functions of seed, epoch and sample: the same whatever the threads, the
backend and, sample by sample, the number of ranks. A step takes ``batch_size`` samples for each
rank from one common order, so a state taken after any step resumes at the very next sample on any
number of ranks. Samples that an index can tell to be broken are never part of the order. One that
turns out broken only when it is decoded makes its batch one smaller; ``verify="decode"`` finds
these beforehand for one pass of decoding. An image with extremely unequal sides, which a recipe
cannot resize, is left out of its batch in any case.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from fastvlp.data.images import backend as image_backends
from fastvlp.data.images.base import BrokenImages
from fastvlp.data.images.conversion import RgbConversion
from fastvlp.data.images.integrity import ImageFault
from fastvlp.data.images.recipes import Recipe
from fastvlp.data.images.recipes import recipe as recipe_named
from fastvlp.data.prefetch import ahead
from fastvlp.data.rng import bits, uniforms
from fastvlp.data.shards.dataset import EpochOrder, RawSample, ShardSet, expand
from fastvlp.data.shards.index import Fault

_STATE_VERSION = 1
# Samples that are mixed with each other: enough that a batch holds many shards' samples.
_WINDOW = 1 << 14


class TooManyBroken(RuntimeError):
    """More of the data is broken than the loader was told to bear."""


@dataclass
class Batch:
    """``n`` samples, normally ``batch_size`` of them."""

    # float32 [n, 3, height, width], normalised.
    images: torch.Tensor
    # bool [n, height, width], true where there are pixels; None unless the recipe pads.
    pixel_mask: torch.Tensor | None
    # What the tokenizer made of the captions; None without one.
    tokens: Any
    captions: list[str]
    # int64 [n], equal for samples of the same id, compared as it is written ("7" is not "007"): the
    # id where it is a plain number of at most 18 digits, else a hash of it; of the sample's own
    # place where it has none.
    ids: torch.Tensor
    # int64 [n], the samples' places in the unshuffled data set.
    index: torch.Tensor

    def __len__(self) -> int:
        return len(self.captions)


@dataclass
class _Step:
    """A batch on its way: what was asked for, found, and left out."""

    end: int
    samples: np.ndarray
    raw: list[Future[RawSample]]
    kept: list[RawSample]
    images: list[Any]
    faults: dict[int, Fault]
    batch: Batch | None = None


class Loader:
    """Batches of one epoch after another; see the module's text.

    Iterating continues where the last iteration stopped and ends with the epoch; the next
    begins the next epoch. ``set_epoch`` goes to the beginning of any.

    Args:
        shards: a path, a folder, a glob or brace pattern, or several of them.
        recipe: a name of ``fastvlp.data.images.recipes.RECIPES`` or a recipe.
        batch_size: samples for each rank and step.
        tokenizer: takes the list of captions, gives ``batch.tokens``. Called in a background
            thread. One whose attribute ``needs_keys`` is true is given int64 ``[n]`` besides:
            random numbers that are functions of seed, epoch and sample.
        clean: applied to each caption; a caption that is empty after it is left out.
        rank, world_size: this process's share.
        seed: of order and augmentation.
        shuffle: about how many samples, in whole shards, are mixed with each other; True for
            16384, 0 for the shards' own order. Default: True for training recipes.
        last_batch: what is done with samples that fill no whole step: "drop" them (default for
            training recipes), "partial" divides them among the ranks, some of which may get none,
            and "wrap" fills up from the beginning of the epoch's order.
        backend: "dali", "pil", or "auto": DALI where it is installed.
        convert: how images of other modes become 8-bit RGB. The default composites transparent
            pixels onto white and maps 16-bit and float images by their range;
            ``RgbConversion(method="pillow")`` is Pillow's ``convert("RGB")``.
        device: where the images go. Default: the GPU if there is one.
        threads: for decoding and transforming. Default: this process's CPUs, divided by
            torchrun's LOCAL_WORLD_SIZE.
        prefetch: batches made ahead.
        max_broken: largest bearable share of broken samples, and of refused shards.
        verify: "quick" or "decode", how the index examines images.
        cache_dir: where indexes are kept; see ``fastvlp.data.cache``.
        progress: called with (shards indexed, shards), where shards that are being indexed count
            with the share that is scanned.

    Raises:
        FileNotFoundError, ValueError: an argument is not as above.
        TooManyBroken: of the data. Raised while iterating as well.
    """

    def __init__(
        self,
        shards: str | os.PathLike | Sequence[str | os.PathLike],
        recipe: str | Recipe,
        batch_size: int,
        tokenizer: Callable[..., Any] | None = None,
        *,
        clean: Callable[[str], str] | None = None,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool | int | None = None,
        last_batch: Literal["drop", "partial", "wrap"] | None = None,
        backend: Literal["auto", "dali", "pil"] = "auto",
        convert: RgbConversion = RgbConversion(),
        device: str | torch.device | None = None,
        threads: int | None = None,
        prefetch: int = 2,
        max_broken: float = 0.1,
        verify: Literal["quick", "decode"] = "quick",
        cache_dir: str | os.PathLike | None = None,
        progress: Callable[[float, int], None] | None = None,
    ) -> None:
        self.recipe = recipe_named(recipe) if isinstance(recipe, str) else recipe
        training = self.recipe.training
        shuffle = training if shuffle is None else shuffle
        last_batch = last_batch or ("drop" if training else "partial")
        threads = threads or _usable_cpus()
        _check(batch_size >= 1, "batch_size: expected 1 or more", batch_size)
        _check(0 <= rank < world_size, f"rank: expected 0 to {world_size - 1}", rank)
        _check(shuffle >= 0, "shuffle: expected a number of samples", shuffle)
        _check(threads >= 1, "threads: expected 1 or more", threads)
        _check(prefetch >= 1, "prefetch: expected 1 or more", prefetch)
        _check(0 <= max_broken <= 1, "max_broken: expected a share, 0 to 1", max_broken)
        _check(verify in ("quick", "decode"), "verify: expected 'quick' or 'decode'", verify)
        policies = ("drop", "partial", "wrap")
        _check(last_batch in policies, f"last_batch: expected one of {policies}", last_batch)
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.seed, self.last_batch, self.max_broken = seed, last_batch, max_broken
        self._tokenizer, self._clean, self._prefetch = tokenizer, clean, prefetch
        self._window = _WINDOW if shuffle is True else int(shuffle)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if self.device.type == "cuda" and self.device.index is None:
            # The background threads' current device is another matter.
            self.device = torch.device("cuda", torch.cuda.current_device())
        paths = expand(shards)
        self._shards = ShardSet(
            paths, verify == "decode", cache_dir, threads, rank * len(paths) // world_size, progress
        )
        self._found: dict[int, Fault] = {}
        self.epoch = self._place = 0
        self._check_indexes()
        self._backend = image_backends.choose(
            backend, self.recipe, batch_size, threads, self.device, convert
        )
        self._readers = ThreadPoolExecutor(threads + 2, thread_name_prefix="fastvlp-read")
        # Of the backend's two stages. An iteration that was given up may still be at work.
        self._decoding, self._making = threading.Lock(), threading.Lock()

    @property
    def backend(self) -> str:
        """The name of the backend at work."""
        return self._backend.name

    @property
    def samples(self) -> int:
        """Good samples of all shards, as far as their indexes tell."""
        return len(self._shards)

    def captions(self, most: int) -> Iterator[str]:
        """Captions of good samples, of at most `most` that are spread evenly over the data."""
        every = max(1, -(-self.samples // most))
        return self._shards.captions(range(0, self.samples, every))

    @property
    def faults(self) -> list[Fault]:
        """Everything that was left out so far, and why; of the iteration, on this rank."""
        return [*self._shards.faults, *self._found.values()]

    @property
    def skipped(self) -> Counter[str]:
        """How many faults there are of each kind; see ``Fault``."""
        return Counter(fault.kind for fault in self.faults)

    def __len__(self) -> int:
        """Batches that are left of this epoch, the same on every rank."""
        step, left = self.batch_size * self.world_size, self.samples - self._place
        return left // step if self.last_batch == "drop" else -(-left // step)

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch."""
        _check(epoch >= 0, "epoch: expected 0 or more", epoch)
        self.epoch, self._place = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is, after the last batch that was taken from it. Equal on all ranks."""
        return {
            "version": _STATE_VERSION,
            "epoch": self.epoch,
            "place": self._place,
            "seed": self.seed,
            "window": self._window,
            "samples": self.samples,
            "shards": self._shards.fingerprint(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state, which may come from another number of ranks or batch size.

        Raises:
            ValueError: the state is of other data or another order.
        """
        mine = self.state_dict()
        for key in ("version", "samples", "shards", "seed", "window"):
            _check(
                state.get(key) == mine[key],
                f"state: its {key} is not that of this loader, {mine[key]!r}",
                state.get(key),
            )
        _check(0 <= state["place"] <= self.samples, "state: place out of range", state["place"])
        self.epoch, self._place = state["epoch"], state["place"]

    def close(self) -> None:
        """Give threads and memory back; the loader is of no use afterwards."""
        self._readers.shutdown()
        self._backend.close()

    def __iter__(self) -> Iterator[Batch]:
        epoch = self.epoch
        order = EpochOrder(self._shards.starts, self.seed, epoch, self._window)
        decoded = ahead(self._decoded(self._read_ahead(order)), 1)
        with closing(ahead(self._made(decoded, epoch), self._prefetch)) as steps:
            for step in steps:
                self._place = step.end
                if step.faults:
                    self._found.update(step.faults)
                    self._check_found()
                yield step.batch
                if (self.epoch, self._place) != (epoch, step.end):
                    raise RuntimeError("the loader's place was set while it was being iterated")
        self.epoch, self._place = epoch + 1, 0

    def _steps(self, order: EpochOrder) -> Iterator[tuple[int, np.ndarray]]:
        """For each step, the place where it ends and this rank's samples."""
        place, end, world = self._place, len(order), self.world_size
        whole = self.batch_size * world
        while place < end and (place + whole <= end or self.last_batch != "drop"):
            size = min(whole, end - place)
            if size < whole and self.last_batch == "wrap":
                samples = order.samples(place, end)
                while len(samples) < whole:
                    samples = np.append(samples, order.samples(0, min(end, whole - len(samples))))
                yield end, samples[self.rank * self.batch_size :][: self.batch_size]
                return
            share, more = divmod(size, world)
            first = place + self.rank * share + min(self.rank, more)
            place += size
            yield place, order.samples(first, first + share + (self.rank < more))

    def _read_ahead(self, order: EpochOrder) -> Iterator[_Step]:
        """Steps whose samples are being read, a few steps ahead of their use."""
        waiting: deque[_Step] = deque()
        for end, samples in self._steps(order):
            raw = [self._readers.submit(self._shards.read, s) for s in samples.tolist()]
            waiting.append(_Step(end, samples, raw, [], [], {}))
            if len(waiting) > self._prefetch:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()

    def _decoded(self, steps: Iterator[_Step]) -> Iterator[_Step]:
        for step in steps:
            kept = []
            for sample, future in zip(step.samples.tolist(), step.raw, strict=True):
                try:
                    raw = future.result()
                except OSError as error:
                    step.faults[sample] = self._fault("unreadable", sample, str(error))
                    continue
                if self._clean and not self._clean(raw.caption).strip():
                    reason = "the caption is empty once cleaned"
                    step.faults[sample] = self._fault("caption", sample, reason)
                    continue
                kept.append(raw)
            step.raw = []
            with self._decoding:
                images = self._backend.decode([raw.image for raw in kept])
            for raw, image in zip(kept, images, strict=True):
                if isinstance(image, ImageFault):
                    step.faults[raw.index] = self._fault("image", raw.index, str(image))
                else:
                    step.kept.append(raw)
                    step.images.append(image)
            yield step

    def _made(self, steps: Iterator[_Step], epoch: int) -> Iterator[_Step]:
        with closing(steps):
            for step in steps:
                while step.batch is None:
                    try:
                        step.batch = self._batch(step, epoch)
                    except BrokenImages as broken:
                        # Of what is left some may turn out broken as well, in another stage.
                        self._drop(step, broken)
                step.kept, step.images = [], []
                yield step

    def _drop(self, step: _Step, broken: BrokenImages) -> None:
        for i, fault in broken.faults.items():
            index = step.kept[i].index
            step.faults[index] = self._fault("image", index, str(fault))
        whole = [i for i in range(len(step.kept)) if i not in broken.faults]
        step.kept, step.images = ([of[i] for i in whole] for of in (step.kept, step.images))

    def _batch(self, step: _Step, epoch: int) -> Batch:
        index = np.array([raw.index for raw in step.kept], np.int64)
        numbers = uniforms(self.seed, epoch, index, self.recipe.uses).tolist()
        with self._making:
            images, mask = self._backend.batch(
                step.images, lambda i, width, height: self.recipe.plan(width, height, numbers[i])
            )
        captions = [raw.caption for raw in step.kept]
        if self._clean:
            captions = [self._clean(caption) for caption in captions]
        tokens = None
        if self._tokenizer is not None:
            keys = []
            if getattr(self._tokenizer, "needs_keys", False):
                # One more use than the recipe's: independent of what it draws.
                random = bits(self.seed, epoch, index, self.recipe.uses + 1)[:, -1]
                keys = [torch.from_numpy((random >> np.uint64(1)).astype(np.int64))]
            tokens = self._tokenizer(captions, *keys)
        ids = torch.tensor([_number(raw) for raw in step.kept], dtype=torch.int64)
        return Batch(images, mask, tokens, captions, ids, torch.from_numpy(index))

    def _fault(self, kind: str, sample: int, reason: str) -> Fault:
        return Fault(kind, *self._shards.name(sample), reason)

    def _check_indexes(self) -> None:
        faults = self._shards.faults
        broken = [fault for fault in faults if fault.is_sample]
        refused = [fault for fault in faults if fault.kind == "refused shard"]
        self._bear(broken, self.samples + len(broken), "samples")
        self._bear(refused, len(self._shards.paths), "shards")
        if not self.samples:
            paths = self._shards.paths
            some = "; ".join(map(str, faults[:3])) or f"{paths[0]}: it holds no member"
            raise TooManyBroken(f"shards: no good sample in any of {len(paths)}; the first: {some}")

    def _check_found(self) -> None:
        share = -(-self.samples // self.world_size)
        of_rank = f" of rank {self.rank}" if self.world_size > 1 else ""
        self._bear(list(self._found.values()), share, f"samples{of_rank}")

    def _bear(self, faults: Sequence[Fault], count: int, what: str) -> None:
        if len(faults) > self.max_broken * count:
            some = "; ".join(map(str, faults[:3]))
            raise TooManyBroken(
                f"{len(faults)} of {count} {what} are broken, more than max_broken="
                f"{self.max_broken}; the first: {some}"
            )


def _number(raw: RawSample) -> int:
    """An int64 that stands for the sample's id."""
    if raw.id is not None and re.fullmatch("0|[1-9][0-9]{0,17}", raw.id):
        return int(raw.id)
    text = raw.id if raw.id is not None else f"\0{raw.index}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def _usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    return max(1, count // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _check(holds: bool, expected: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{expected}; got {got!r}")
