"""From ViLT's settings to its task and its data."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastvlp.data.text import vilt_tokenizer
from fastvlp.data.text.masked import MaskingTokenizer
from fastvlp.models import base, vilt
from fastvlp.train import trained
from fastvlp.train.config import TrainVilt
from fastvlp.train.parallel import Ranks
from fastvlp.train.sizes import with_file
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
from fastvlp.train.tasks.vilt import PretrainingVilt, ViltTask
from fastvlp.train.tasks.vocabularies import bert_from_shards, bert_vocabulary


def build(config: TrainVilt, ranks: Ranks) -> tuple[ViltTask, Any]:
    """The task and the training loader."""
    rows = per_rank_batch_size(config.batch_size, ranks)
    start = None if config.init is None else _start(config)
    sizes = _sizes(config) if start is None else start.config
    make = _openmoji if config.data == "openmoji" else _shards
    own = None if start is None else _vocabulary(config, start)
    tokenizer, loader, held_out = make(config, sizes, ranks, rows, own)
    if start is None:
        sizes = dataclasses.replace(sizes, vocab_size=tokenizer.vocab_size)
    model = PretrainingVilt(sizes)
    if start is not None:
        model.load_state_dict(start.state_dict())
    task = ViltTask(
        model,
        tokenizer,
        ranks,
        held_out=held_out,
        chunk_size=config.chunk_size,
        reference=config.reference,
    )
    return task, loader


def _sizes(config: TrainVilt) -> vilt.ViltConfig:
    if config.model not in vilt.CONFIGS:
        raise base.unknown_name("model", config.model, list(vilt.CONFIGS))
    return with_file(vilt.CONFIGS[config.model], config.model_config)


def _start(config: TrainVilt) -> vilt.Vilt:
    """The model that the training starts from, with the heads of pretraining."""
    if config.model_config is not None:
        raise ValueError(
            f"model_config: expected none, because the sizes are those of {config.init}"
        )
    found, _ = trained.load(config.init)
    found = trained.of_kind(found, "vilt", config.init)
    tasks = vilt.ViltConfig().tasks
    if found.config.tasks == tasks:
        return found
    model = vilt.Vilt(dataclasses.replace(found.config, tasks=tasks))
    own, state = model.state_dict(), found.state_dict()
    shared = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    model.load_state_dict(own | shared)
    return model


def _vocabulary(config: TrainVilt, start: vilt.Vilt) -> list[str]:
    return trained.tokenizer(config.init, start, config.tokenizer).entries


def _openmoji(config: TrainVilt, sizes: vilt.ViltConfig, ranks: Ranks, rows: int, own):
    data = openmoji_data(sizes.image_size, ranks, config.progress)
    source = own or bert_vocabulary(config.tokenizer, openmoji_captions(data))
    tokenizer = vilt_tokenizer(source, padding="longest", context_length=sizes.context_length)
    # Of captions as short as these the published budget, of the padded row, would mask everything.
    masking = MaskingTokenizer(tokenizer, rate=config.mask_rate, whole_word=True)
    loader = openmoji_loader(data, "train", rows, masking, ranks, training=True, seed=config.seed)
    held_out = {
        split: openmoji_loader(data, split, rows, tokenizer.padded, ranks, training=False)
        for split in HELD_OUT
    }
    return tokenizer, loader, held_out


def _shards(config: TrainVilt, sizes: vilt.ViltConfig, ranks: Ranks, rows: int, own):
    source = own or bert_from_shards(config, "vilt_train", ranks)
    tokenizer = vilt_tokenizer(source, context_length=sizes.context_length)
    masking = MaskingTokenizer(tokenizer, rate=config.mask_rate, whole_word=True, budget="padded")
    recipe = trained.vilt_sizes(sizes)
    options = image_options(config)
    loader = shard_loader(
        config.data, "vilt_train", recipe, rows, masking, ranks, seed=config.seed, **options
    )
    held_out = held_out_loaders(
        config, "vilt_eval", recipe, rows, tokenizer.padded, ranks, **options
    )
    return tokenizer, loader, held_out
