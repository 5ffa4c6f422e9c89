"""From CLIP's settings to its task and its data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastvlp.data import openmoji
from fastvlp.data.openmoji_batches import OpenMojiLoader
from fastvlp.data.text import CaptionTokenizer, train_tokenizer
from fastvlp.models import clip
from fastvlp.train.config import TrainClip
from fastvlp.train.parallel import Ranks
from fastvlp.train.tasks.clip import (
    ClipTask,
    features,
    openmoji_groups,
    zero_shot_over_groups,
)

HELD_OUT = ("composition", "concept")


def build(config: TrainClip, ranks: Ranks) -> tuple[ClipTask, Any]:
    """The task and the training loader."""
    rows = _rows_of_a_rank(config, ranks)
    if config.model not in clip.CONFIGS:
        raise ValueError(f"model: expected one of {sorted(clip.CONFIGS)}, got {config.model!r}")
    size = clip.CONFIGS[config.model].image_size
    make = _openmoji if config.data == "openmoji" else _shards
    tokenizer, loader, held_out, groups = make(config, ranks, rows, size)
    model = clip.create(
        config.model,
        vocab_size=tokenizer.vocab_size,
        context_length=min(tokenizer.context_length, 77),
    )
    task = ClipTask(
        model,
        tokenizer,
        ranks,
        held_out=held_out,
        chunk_size=config.chunk_size,
        groups=groups,
        reference=config.reference,
    )
    return task, loader


def _rows_of_a_rank(config: TrainClip, ranks: Ranks) -> int:
    rows, rest = divmod(config.batch_size, ranks.world_size)
    if rest:
        raise ValueError(
            f"batch_size: expected a multiple of the {ranks.world_size} ranks, got "
            f"{config.batch_size}"
        )
    return rows


def openmoji_loader(
    size: int, split: str, rows: int, tokenizer: Callable, ranks: Ranks, **options: Any
) -> OpenMojiLoader:
    """A split of the built-in pictures; `options` are the loader's."""
    data = _openmoji_data(size, ranks)
    place = {"rank": ranks.rank, "world_size": ranks.world_size, "device": ranks.device}
    return OpenMojiLoader(data, split, rows, tokenizer, **place, **options)


def shard_loader(
    shards: str, recipe: str, size: int, rows: int, tokenizer: Callable, ranks: Ranks, seed: int = 0
):
    """Shards by `fastvlp.data.loader.Loader`."""
    from fastvlp.data import recipes
    from fastvlp.data.loader import Loader

    return Loader(
        shards,
        recipes.recipe(recipe, size=size),
        rows,
        tokenizer,
        rank=ranks.rank,
        world_size=ranks.world_size,
        seed=seed,
        device=ranks.device,
    )


def zero_shot_openmoji(model, tokenizer: Callable, ranks: Ranks, rows: int) -> dict[str, float]:
    """Accuracy over base emoji on the composition split."""
    size = model.config.image_size
    train = openmoji_loader(size, "train", rows, tokenizer, ranks, training=False)
    loader = openmoji_loader(size, "composition", rows, tokenizer, ranks, training=False)
    found = features(model, loader, ranks)
    return zero_shot_over_groups(model, tokenizer, openmoji_groups(train), loader.bases, found)


def _openmoji_data(size: int, ranks: Ranks, progress: bool = True) -> openmoji.OpenMoji:
    # One rank renders what the others then find.
    if ranks.is_first:
        openmoji.build(size=size, progress=progress)
    ranks.barrier()
    return openmoji.build(size=size, progress=False)


def _openmoji(config: TrainClip, ranks: Ranks, rows: int, size: int):
    data = _openmoji_data(size, ranks, config.progress)
    captions = [sample.members["txt"].decode() for sample in data.samples("train")]
    tokenizer = _tokenizer(config.tokenizer, captions)
    loader = openmoji_loader(size, "train", rows, tokenizer, ranks, training=True, seed=config.seed)
    held_out = {
        split: openmoji_loader(size, split, rows, tokenizer, ranks, training=False)
        for split in HELD_OUT
    }
    return tokenizer, loader, held_out, openmoji_groups(loader)


def _shards(config: TrainClip, ranks: Ranks, rows: int, size: int):
    if config.tokenizer is None:
        raise ValueError("tokenizer: expected a vocabulary file where the data are shards")
    tokenizer = _tokenizer(config.tokenizer, [])
    loader = shard_loader(config.data, "clip_train", size, rows, tokenizer, ranks, config.seed)
    held_out = {}
    if config.eval_data is not None:
        held_out["eval"] = shard_loader(config.eval_data, "clip_eval", size, rows, tokenizer, ranks)
    return tokenizer, loader, held_out, {}


def _tokenizer(path: Path | None, captions: list[str]) -> Callable:
    if path is None:
        return train_tokenizer(captions, model="word")
    return CaptionTokenizer.load(path)
