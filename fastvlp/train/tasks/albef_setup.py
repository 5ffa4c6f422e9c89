"""From ALBEF's settings to its task and its data."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastvlp.data.text import albef_tokenizer
from fastvlp.data.text.cleaning import clean_albef
from fastvlp.data.text.masked import MaskingTokenizer
from fastvlp.models import albef, base
from fastvlp.train.config import TrainAlbef
from fastvlp.train.parallel import Ranks
from fastvlp.train.sizes import with_file
from fastvlp.train.tasks.albef import AlbefTask
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
from fastvlp.train.tasks.vocabularies import bert_from_shards, bert_vocabulary


def build(config: TrainAlbef, ranks: Ranks) -> tuple[AlbefTask, Any]:
    """The task and the training loader."""
    rows = per_rank_batch_size(config.batch_size, ranks)
    if config.model not in albef.CONFIGS:
        raise base.unknown_name("model", config.model, list(albef.CONFIGS))
    named = with_file(albef.CONFIGS[config.model], config.model_config)
    size = named.image_size
    make = _openmoji if config.data == "openmoji" else _shards
    tokenizer, loader, held_out = make(config, size, ranks, rows)
    sizes = {"queue_size": config.queue_size, "momentum": config.momentum}
    model = albef.Albef(
        dataclasses.replace(
            named,
            vocab_size=tokenizer.vocab_size,
            queue_ids=config.match_ids,
            **{name: value for name, value in sizes.items() if value is not None},
        )
    )
    start_from_files(model, config)
    task = AlbefTask(
        model,
        tokenizer,
        ranks,
        held_out=held_out,
        chunk_size=config.chunk_size,
        alpha=config.alpha,
        alpha_steps=max(1, round(config.alpha_epochs * len(loader))),
        candidates=config.candidates,
        reference=config.reference,
    )
    return task, loader


def start_from_files(model: albef.Albef, config: TrainAlbef) -> None:
    """Give the model, and its momentum encoder, the pretrained towers that the settings name."""
    from fastvlp.models.checkpoints import albef as checkpoints

    if config.vision_weights is not None:
        checkpoints.load_vit(model, config.vision_weights)
    if config.text_weights is not None:
        checkpoints.load_bert(model, config.text_weights)


def _openmoji(config: TrainAlbef, size: int, ranks: Ranks, rows: int):
    data = openmoji_data(size, ranks, config.progress)
    # Pretrained text layers know BERT's own entries.
    captions = [] if config.text_weights is not None else openmoji_captions(data)
    source = bert_vocabulary(config.tokenizer, captions, clean_albef)
    tokenizer = albef_tokenizer(source)
    masking = MaskingTokenizer(tokenizer, rate=config.mask_rate)
    loader = openmoji_loader(data, "train", rows, masking, ranks, training=True, seed=config.seed)
    held_out = {
        split: openmoji_loader(data, split, rows, tokenizer.padded, ranks, training=False)
        for split in HELD_OUT
    }
    return tokenizer, loader, held_out


def _shards(config: TrainAlbef, size: int, ranks: Ranks, rows: int):
    if config.text_weights is not None:
        source = bert_vocabulary(config.tokenizer, [])
    else:
        source = bert_from_shards(config, "albef_pretrain", ranks, clean_albef)
    tokenizer = albef_tokenizer(source)
    masking = MaskingTokenizer(tokenizer, rate=config.mask_rate)
    sizes, options = {"size": size}, image_options(config)
    loader = shard_loader(
        config.data, "albef_pretrain", sizes, rows, masking, ranks, seed=config.seed, **options
    )
    held_out = held_out_loaders(
        config, "albef_eval", sizes, rows, tokenizer.padded, ranks, **options
    )
    return tokenizer, loader, held_out
