"""What a run of CLIP takes where its settings leave the choice open: sizes for data and machine.

On the built-in images the settings that their published curves were made with. On shards:

    model       a CPU, or a GPU with few pairs, trains "tiny"; a GPU with more, ViT-S/32 or ViT-B/32
    batch size  the power of two that is at most half of the pairs, up to 128 on a CPU and 1024 on
                each GPU
    epochs      as many as fit into 20,000 pairs for each core, or 10 million for each GPU, between
                5 and 60
    warmup      a tenth of the steps, at most 2000
    lr          1e-3 for "tiny", 5e-4 for larger models

Weights that are given (`init`) bring their size, which is mostly larger; training goes on from them
with lr 1e-5, up to 32 pairs on a CPU, and a twentieth of the pairs, between 5 and 30 epochs.

A run that goes on keeps what it was begun with.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from fastvlp.train import parallel, run_folder, screen
from fastvlp.train.config import TrainClip, TrainConfig, from_mapping, read_yaml
from fastvlp.train.parallel import Ranks
from fastvlp.train.presets import OPENMOJI_CLIP
from fastvlp.train.tasks.data import image_options, shard_loader

_CPU_PAIRS, _GPU_PAIRS = 20_000, 10_000_000
_FEWEST_EPOCHS, _MOST_EPOCHS = 5, 60
# Pairs from which on a GPU trains the next larger model.
_SMALL, _BASE = 50_000, 2_000_000
_FORM = {"epochs": "g", "lr": "g"}
OPEN = ("model", "batch_size", "epochs", "lr", "warmup")


def settled(config: TrainConfig, ranks: Ranks) -> TrainConfig:
    """The settings with everything decided that they leave open, the same on all ranks.

    Raises:
        FileNotFoundError, ValueError: the data are no shards.
    """
    if not isinstance(config, TrainClip) or not _open(config):
        return config
    found = parallel.from_first(lambda: _begun_with(config), ranks)
    if found is None and config.data == "openmoji":
        found = OPENMOJI_CLIP if config.init is None else OPENMOJI_CLIP | {"lr": 1e-5}
    if found is None:
        pairs, cores = _pairs(config, ranks), _cores()
        found = for_pairs(pairs, config, cores, ranks)
        if ranks.is_first:
            about = _said(found, config, pairs, cores, ranks)
            print("\n".join(screen.labelled("chosen", about)), flush=True)
    chosen = {name: found[name] for name in _open(config)}
    if "epochs" in chosen and found.get("steps") is not None:
        chosen["steps"] = found["steps"]
    return dataclasses.replace(config, **chosen)


def _open(config: TrainClip) -> list[str]:
    names = [name for name in OPEN if getattr(config, name) is None]
    if config.init is not None:  # whose size it is
        names = [name for name in names if name != "model"]
    return [name for name in names if name != "epochs" or config.steps is None]


def _begun_with(config: TrainClip) -> dict[str, Any] | None:
    """The settings of the run that is to go on, or None."""
    file = config.folder / "config.yaml"
    if not run_folder.checkpoints(config.folder) or not file.is_file():
        return None
    wanted = (*OPEN, "steps", "init")
    stored = {name: value for name, value in read_yaml(file).items() if name in wanted}
    begun = from_mapping(TrainClip, stored, str(file))
    return None if _open(begun) else dataclasses.asdict(begun)


def _said(found: dict[str, Any], config: TrainClip, pairs: int, cores: int, ranks: Ranks) -> str:
    machine = f"{cores} CPU cores" if ranks.device.type == "cpu" else f"{ranks.world_size} GPU"
    chosen = ", ".join(
        f"{name.replace('_', ' ')} {found[name]:{_FORM.get(name, '')}}" for name in _open(config)
    )
    return f"{chosen}, for {pairs} pairs and {machine}"


def _pairs(config: TrainClip, ranks: Ranks) -> int:
    loader = shard_loader(config.data, "clip_train", {}, 1, None, ranks, **image_options(config))
    try:
        return loader.samples
    finally:
        loader.close()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def for_pairs(pairs: int, config: TrainClip, cores: int, ranks: Ranks) -> dict[str, Any]:
    """The value of each open setting for a number of pairs; what is given counts in the others.

    Args:
        pairs: of the training data.
        config: settings, of which those that are given are kept.
        cores: of the CPU, for this process.
        ranks: the device and the number of processes.
    """
    gpu, world = ranks.device.type == "cuda", ranks.world_size
    model = config.model or _model(pairs, gpu)
    batch = config.batch_size
    if batch is None:
        limit = 1024 if gpu else 128 if config.init is None else 32
        most = max(1, min(pairs // 2 // world, limit))
        batch = world * 2 ** (most.bit_length() - 1)
    budget, longest = world * (_GPU_PAIRS if gpu else _CPU_PAIRS * cores), _MOST_EPOCHS
    if config.init is not None:
        budget, longest = budget // 20, _MOST_EPOCHS // 2
    epochs = config.epochs or float(min(max(budget // max(pairs, 1), _FEWEST_EPOCHS), longest))
    steps = config.steps or max(1, round(epochs * (pairs // batch)))
    return {
        "model": model,
        "batch_size": batch,
        "epochs": epochs,
        "lr": _rate(config, model),
        "warmup": min(2000, steps // 10),
    }


def _rate(config: TrainClip, model: str) -> float:
    if config.init is not None:
        return 1e-5
    return 1e-3 if model == "tiny" else 5e-4


def _model(pairs: int, gpu: bool) -> str:
    if not gpu or pairs < _SMALL:
        return "tiny"
    return "ViT-S/32" if pairs < _BASE else "ViT-B/32"
