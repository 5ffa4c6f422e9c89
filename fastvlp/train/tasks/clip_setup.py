"""From CLIP's settings to its task and its data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from fastvlp.data.images import recipes
from fastvlp.data.images.recipes import Recipe
from fastvlp.data.text import files as tokenizer_files
from fastvlp.data.text import train_tokenizer
from fastvlp.models import clip
from fastvlp.train import trained
from fastvlp.train.config import TrainClip
from fastvlp.train.parallel import Ranks
from fastvlp.train.sizes import with_file
from fastvlp.train.tasks.clip import (
    ClipTask,
    features,
    openmoji_groups,
    zero_shot_over_groups,
)
from fastvlp.train.tasks.data import (
    HELD_OUT,
    held_out_loaders,
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
    start = None if config.init is None else _start(config)
    if start is None:
        sizes = clip.config_of_name(config.model, "model")
        sizes = with_file(sizes, config.model_config)
        tokenizer = None
        if config.tokenizer is not None:
            tokenizer = tokenizer_files.for_clip(config.tokenizer, sizes.context_length)
    else:
        sizes = start.config
        tokenizer = trained.tokenizer(config.init, start, config.tokenizer)
    make = _openmoji if config.data == "openmoji" else _shards
    tokenizer, loader, held_out, groups = make(config, tokenizer, ranks, rows, sizes)
    model = start
    if model is None:
        words = {"vocab_size": tokenizer.vocab_size, "context_length": tokenizer.context_length}
        model = clip.Clip(dataclasses.replace(sizes, **words))
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


def _start(config: TrainClip) -> clip.Clip:
    """The model that the training starts from, in training mode."""
    model, _ = trained.load(config.init, config.activation)
    return trained.of_kind(model, "clip", config.init).train()


def _recipe(config: TrainClip, name: str, sizes: clip.ClipConfig) -> Recipe:
    values = {}
    if config.init is not None:
        values = dict(zip(("mean", "std"), trained.image_values(config.init), strict=True))
    return recipes.recipe(name, size=sizes.image_size, **values)


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
    options = image_options(config)
    if config.init is not None and ranks.is_first:
        trained.keep_image_values(config.folder, trained.image_values(config.init))
    loader = shard_loader(
        config.data,
        _recipe(config, "clip_train", sizes),
        {},
        rows,
        tokenizer,
        ranks,
        seed=config.seed,
        **options,
    )
    held_out = held_out_loaders(
        config,
        _recipe(config, "clip_eval", sizes),
        {},
        rows,
        tokenizer,
        ranks,
        **options,
    )
    return tokenizer, loader, held_out, {}
