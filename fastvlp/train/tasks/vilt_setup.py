"""From ViLT's settings to its task and its data."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from fastvlp.data.text import BertTokenizer, vilt_tokenizer
from fastvlp.data.text.masked import MaskingTokenizer
from fastvlp.models import base, vilt
from fastvlp.train.config import TrainVilt
from fastvlp.train.parallel import Ranks
from fastvlp.train.tasks.data import (
    HELD_OUT,
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
    if config.model not in vilt.CONFIGS:
        raise base.unknown_name("model", config.model, list(vilt.CONFIGS))
    sizes = vilt.CONFIGS[config.model]
    make = _openmoji if config.data == "openmoji" else _shards
    tokenizer, loader, held_out = make(config, sizes, ranks, rows)
    model = PretrainingVilt(dataclasses.replace(sizes, vocab_size=tokenizer.vocab_size))
    task = ViltTask(
        model,
        tokenizer,
        ranks,
        held_out=held_out,
        chunk_size=config.chunk_size,
        reference=config.reference,
    )
    return task, loader


def _openmoji(config: TrainVilt, sizes: vilt.ViltConfig, ranks: Ranks, rows: int):
    data = openmoji_data(sizes.image_size, ranks, config.progress)
    source = bert_vocabulary(config.tokenizer, openmoji_captions(data))
    tokenizer = vilt_tokenizer(source, padding="longest", context_length=sizes.context_length)
    # Of captions as short as these the published budget, of the padded row, would mask everything.
    masking = MaskingTokenizer(tokenizer, rate=config.mask_rate, whole_word=True)
    loader = openmoji_loader(data, "train", rows, masking, ranks, training=True, seed=config.seed)
    held_out = {
        split: openmoji_loader(data, split, rows, tokenizer.padded, ranks, training=False)
        for split in HELD_OUT
    }
    return tokenizer, loader, held_out


def _shards(config: TrainVilt, sizes: vilt.ViltConfig, ranks: Ranks, rows: int):
    source = bert_from_shards(config, "vilt_train", ranks)
    tokenizer = vilt_tokenizer(source, context_length=sizes.context_length)
    masking = MaskingTokenizer(tokenizer, rate=config.mask_rate, whole_word=True, budget="padded")
    recipe = recipe_sizes(sizes)
    options = image_options(config)
    loader = shard_loader(
        config.data, "vilt_train", recipe, rows, masking, ranks, seed=config.seed, **options
    )
    held_out = {}
    if config.eval_data is not None:
        held_out["eval"] = shard_loader(
            config.eval_data, "vilt_eval", recipe, rows, tokenizer.padded, ranks, **options
        )
    return tokenizer, loader, held_out


def recipe_sizes(sizes: vilt.ViltConfig) -> dict[str, int]:
    """Parameters of ViLT's image transforms: a side is at most 1333 / 800 of the other."""
    shorter = sizes.image_size
    return {
        "shorter": shorter,
        "longer": int(1333 / 800 * shorter),
        "multiple": sizes.patch_size,
    }


def tokenizer_of(file: Path | None, sizes: vilt.ViltConfig) -> BertTokenizer:
    """The tokenizer of a trained model; without a file with the paper's vocabulary."""
    source = bert_vocabulary(file, [])
    return vilt_tokenizer(source, padding="longest", context_length=sizes.context_length)
