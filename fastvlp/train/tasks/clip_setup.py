"""From CLIP's settings to its task and its data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastvlp.data.text import ClipTokenizer, train_tokenizer
from fastvlp.data.text import files as tokenizer_files
from fastvlp.models import clip
from fastvlp.train.config import TrainClip
from fastvlp.train.parallel import Ranks
from fastvlp.train.tasks.clip import (
    ClipTask,
    features,
    openmoji_groups,
    zero_shot_over_groups,
)
from fastvlp.train.tasks.data import (
    HELD_OUT,
    image_options,
    openmoji_captions,
    openmoji_data,
    openmoji_loader,
    per_rank_batch_size,
    shard_loader,
)
from fastvlp.train.tasks.vocabularies import ENTRIES, learned


def build(config: TrainClip, ranks: Ranks) -> tuple[ClipTask, Any]:
    """The task and the training loader."""
    rows = per_rank_batch_size(config.batch_size, ranks)
    sizes = clip.config_of_name(config.model, "model")
    tokenizer = None
    if config.tokenizer is not None:
        tokenizer = tokenizer_files.for_clip(config.tokenizer, sizes.context_length)
    make = _openmoji if config.data == "openmoji" else _shards
    tokenizer, loader, held_out, groups = make(config, tokenizer, ranks, rows, sizes)
    model = clip.Clip(
        dataclasses.replace(
            sizes,
            vocab_size=tokenizer.vocab_size,
            context_length=tokenizer.context_length,
        )
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


def zero_shot_openmoji(
    model, tokenizer: Callable, ranks: Ranks, rows: int
) -> tuple[dict[str, float], int]:
    """Accuracy over base emoji on the composition split, and its number of pairs."""
    data = openmoji_data(model.config.image_size, ranks)
    train = openmoji_loader(data, "train", rows, tokenizer, ranks, training=False)
    loader = openmoji_loader(data, "composition", rows, tokenizer, ranks, training=False)
    found = features(model, loader, ranks)
    groups = openmoji_groups(train)
    return zero_shot_over_groups(model, tokenizer, groups, loader.bases, found), loader.samples


def _openmoji(config: TrainClip, tokenizer, ranks: Ranks, rows: int, sizes: clip.ClipConfig):
    data = openmoji_data(sizes.image_size, ranks, config.progress)
    if tokenizer is None:
        tokenizer = train_tokenizer(openmoji_captions(data), model="word")
    loader = openmoji_loader(data, "train", rows, tokenizer, ranks, training=True, seed=config.seed)
    held_out = {
        split: openmoji_loader(data, split, rows, tokenizer, ranks, training=False)
        for split in HELD_OUT
    }
    return tokenizer, loader, held_out, openmoji_groups(loader)


def _shards(config: TrainClip, tokenizer, ranks: Ranks, rows: int, sizes: clip.ClipConfig):
    if tokenizer is None:

        def learn(captions: list[str]):
            return train_tokenizer(captions, "bpe", ENTRIES, sizes.context_length)

        file = learned(config, "clip_train", "tokenizer.json", learn, ranks)
        tokenizer = tokenizer_files.for_clip(file)
    recipe, options = {"size": sizes.image_size}, image_options(config)
    loader = shard_loader(
        config.data, "clip_train", recipe, rows, tokenizer, ranks, seed=config.seed, **options
    )
    held_out = {}
    if config.eval_data is not None:
        held_out["eval"] = shard_loader(
            config.eval_data, "clip_eval", recipe, rows, tokenizer, ranks, **options
        )
    return tokenizer, loader, held_out, {}


def tokenizer_of(file: Path | None, sizes: clip.ClipConfig) -> Callable:
    """The tokenizer of a trained model; without a file with the paper's vocabulary."""
    length = sizes.context_length
    if file is None:
        return ClipTokenizer(context_length=length, truncate=True)
    tokenizer = tokenizer_files.for_clip(file, length)
    if tokenizer.context_length > length:
        raise ValueError(
            f"tokenizer: expected at most the model's {length} ids of a caption, got "
            f"{tokenizer.context_length} of {file}"
        )
    return tokenizer
