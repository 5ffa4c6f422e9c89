"""The data of a run: built-in images or shards, and each rank's share of them."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fastvlp.data import RgbConversion, openmoji
from fastvlp.data.images.recipes import Recipe
from fastvlp.data.openmoji.loader import OpenMojiLoader
from fastvlp.data.shards.index import Fault
from fastvlp.train import parallel
from fastvlp.train.parallel import Ranks

HELD_OUT = ("composition", "concept")
# Seconds between lines of progress.
_LINES = 5.0
# What `fastvlp shards` reads.
_TABLES = {".csv", ".tsv", ".parquet", ".json", ".jsonl"}


def per_rank_batch_size(batch_size: int, ranks: Ranks) -> int:
    """Pairs of a step on each rank.

    Raises:
        ValueError: the ranks cannot share the batch evenly.
    """
    rows, rest = divmod(batch_size, ranks.world_size)
    if rest:
        raise ValueError(
            f"batch_size: expected a multiple of the {ranks.world_size} ranks, got {batch_size}"
        )
    return rows


def openmoji_data(size: int, ranks: Ranks, progress: bool = True) -> openmoji.OpenMoji:
    """The built-in images, `size` pixels wide; rendered once, by one rank."""
    parallel.from_first(lambda: _render(size, progress), ranks, takes_long=True)
    return openmoji.build(size=size, progress=False)


def _render(size: int, progress: bool) -> None:
    openmoji.build(size=size, progress=progress)


def openmoji_captions(data: openmoji.OpenMoji) -> list[str]:
    """Captions of the built-in images for training."""
    return [sample.members["txt"].decode() for sample in data.samples("train")]


def openmoji_loader(
    data: openmoji.OpenMoji,
    split: str,
    rows: int,
    tokenizer: Callable,
    ranks: Ranks,
    **options: Any,
) -> OpenMojiLoader:
    """A split of the built-in images; `options` are the loader's."""
    place = {"rank": ranks.rank, "world_size": ranks.world_size, "device": ranks.device}
    return OpenMojiLoader(data, split, rows, tokenizer, **place, **options)


def shard_loader(
    shards: str,
    recipe: str | Recipe,
    sizes: dict[str, int],
    rows: int,
    tokenizer: Callable | None,
    ranks: Ranks,
    *,
    progress: bool = True,
    **options: Any,
):
    """Shards by `fastvlp.data.loader.Loader`, whose are the `options`; `sizes` are parameters of
    a recipe that is named. While they are examined, which takes long the first time, lines say how
    far it is, unless `progress` is False. An error on any rank is raised on all.

    Raises:
        ValueError: it is a table of pairs that is given.
    """
    from fastvlp.data.images import recipes
    from fastvlp.data.loader import Loader

    if Path(shards).suffix.lower() in _TABLES and Path(shards).is_file():
        raise ValueError(
            f"data: expected WebDataset shards, got {shards}; turn it into shards with: fastvlp "
            f"shards {shards} FOLDER"
        )
    with parallel.failing_together(ranks.group):
        loader = Loader(
            shards,
            recipes.recipe(recipe, **sizes) if isinstance(recipe, str) else recipe,
            rows,
            tokenizer,
            rank=ranks.rank,
            world_size=ranks.world_size,
            device=ranks.device,
            progress=lines_of_progress(shards) if progress and ranks.is_first else None,
            **options,
        )
    return loader


def named_sets(given: Sequence[str], argument: str = "eval_data") -> dict[str, str]:
    """Held-out data by name: of NAME=SHARDS the name, else "eval" for one and folders for several.

    Args:
        given: SHARDS or NAME=SHARDS each.
        argument: what they were given as, for the error.

    Raises:
        ValueError: two have one name.

    Example:
        >>> named_sets(["a/val"]), named_sets(["a/val/*.tar", "flickr=b/{0..3}.tar"])
        ({'eval': 'a/val'}, {'val': 'a/val/*.tar', 'flickr': 'b/{0..3}.tar'})
    """
    found: dict[str, str] = {}
    for each in given:
        name, _, shards = each.partition("=")
        if not shards or "/" in name or Path(each).exists():
            name, shards = _short_name(each) if len(given) > 1 else "eval", each
        if name in found:
            raise ValueError(
                f"{argument}: expected a name for each set, got {name!r} for {found[name]} and "
                f"{shards}; write NAME={shards}"
            )
        found[name] = shards
    return found


def _short_name(shards: str) -> str:
    """The last part of a path that is no pattern and no file."""
    parts = [part for part in Path(shards).parts if not re.search(r"[*?{\[]|\.tar$", part)]
    return parts[-1] if parts else "eval"


def held_out_loaders(
    config: Any,
    recipe: str | Recipe,
    sizes: dict[str, int],
    rows: int,
    tokenizer: Callable,
    ranks: Ranks,
    **options: Any,
) -> dict[str, Any]:
    """A loader for each set that the settings of a run evaluate on, by name; see `shard_loader`."""
    return {
        name: shard_loader(shards, recipe, sizes, rows, tokenizer, ranks, **options)
        for name, shards in named_sets(config.eval_data).items()
    }


def lines_of_progress(shards: str) -> Callable[[float, int], None]:
    """Says every few seconds how many of the shards are examined; nothing where that is quick."""
    said = time.monotonic()

    def say(done: float, count: int) -> None:
        nonlocal said
        if done < count and time.monotonic() - said >= _LINES:
            said = time.monotonic()
            print(f"{shards}: examined {done:.1f} of {count} shards", flush=True)

    return say


def image_options(config: Any) -> dict[str, Any]:
    """What the settings of a run say to `shard_loader` of images."""
    convert = RgbConversion(config.background, config.convert)
    bounds = {"verify": config.verify, "max_broken": config.max_broken}
    return {**bounds, "convert": convert, "progress": config.progress}


def left_out(loader: Any, ranks: Ranks) -> list[Fault]:
    """What all ranks have left out of a loader's data so far; every rank calls it.

    Loaders without `faults`, such as those of the built-in images, leave nothing out.
    """
    own = {ranks.rank: list(getattr(loader, "faults", ()))}
    everyone = parallel.gathered(own, ranks).values()
    # What the index tells is the same on all ranks.
    return list(dict.fromkeys(fault for faults in everyone for fault in faults))


def about_left_out(faults: Sequence[Fault], where: str) -> str:
    """One line: how many things were left out, of which kinds, and the first three."""
    kinds = Counter(fault.kind for fault in faults).most_common()
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds)
    first = "; ".join(map(str, faults[:3]))
    return f"{where}: {len(faults)} left out ({counts}); the first: {first}"


def split_pairs(batch: Any, rows: int, least: int = 1) -> Iterator[tuple[Any, float]]:
    """At least so many parts of a batch of masked pairs, each with its share of the pairs."""
    total = len(batch)
    for start in range(0, max(total, least * rows), rows):
        part = _Pairs(batch, slice(start, min(total, start + rows)))
        yield part, len(part) / max(total, 1)


class _Pairs:
    """Some rows of a loader's batch."""

    def __init__(self, batch: Any, rows: slice) -> None:
        self.images, self.ids, self.index = batch.images[rows], batch.ids[rows], batch.index[rows]
        self.captions = batch.captions[rows]
        self.pixel_mask = None if batch.pixel_mask is None else batch.pixel_mask[rows]
        self.tokens = batch.tokens[rows]

    def __len__(self) -> int:
        return len(self.captions)
