"""The settings of a training run: dataclasses, presets, and YAML files of them."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from fastvlp.data.optional import require
from fastvlp.train import ranges
from fastvlp.train.schedules import Kind

Device = Literal["auto", "cpu", "cuda"]
Verify = Literal["quick", "decode"]
Convert = Literal["range", "pillow"]


@dataclass
class TrainConfig:
    """What every run has. Rates, sizes and schedules have their defaults in each system's class."""

    # The kind of its models, see fastvlp.models.base.
    system: ClassVar[str]
    # Whether None stands for a choice by data and machine, see fastvlp.train.automatic.
    has_open_settings: ClassVar[bool] = False
    # Settings that change what this system learns although for others they only change the speed.
    learns_by: ClassVar[frozenset[str]] = frozenset()

    folder: Path = Path("runs/train")
    """Folder of the run: settings, checkpoints, logs, and in the end the model."""

    data: str = "openmoji"
    """"openmoji" for the built-in images, else a path, folder or pattern of WebDataset shards."""

    eval_data: tuple[str, ...] = ()
    """Shards to evaluate on, where the data are shards; several sets one after another, each as
    SHARDS or NAME=SHARDS. By default one is called eval, and several by their folders."""

    verify: Verify = "quick"
    """How the images of shards are examined before the run. decode: decode each, so that
    none turns out undecodable later; it takes one pass over the data, once. An image with extremely
    unequal sides may still be left out of its batch."""

    max_broken: float = 0.1
    """Largest bearable share of broken samples in shards; they are left out of their batches."""

    convert: Convert = "range"
    """How images of shards become 8-bit RGB. range: transparent pixels on a background, 16-bit and
    float images by their range; see fastvlp.data.RgbConversion. pillow: Pillow's convert("RGB")."""

    background: str = "white"
    """Colour under transparent pixels, by name or as #rrggbb."""

    model: str = "tiny"
    """Name of the model's size. By default CLIP's is chosen for the data and the machine, as are
    its epochs, batch size, learning rate and warmup; the run says which."""

    model_config: Path | None = None
    """YAML file with sizes that differ from those of the named model, such as `vision_layers: 8`;
    for CLIP without a name from those of tiny."""

    tokenizer: Path | None = None
    """Vocabulary of the tokenizer: for CLIP its bpe_simple_vocab_16e6.txt.gz, vocab.json with
    merges.txt, or tokenizer.json; for ViLT and ALBEF BERT's vocab.txt or tokenizer.json. By default
    one is learned from the captions of the data; it is kept in the run's folder."""

    steps: int | None = None
    """Length of the run in optimiser steps. Given, it counts in place of epochs."""

    epochs: float | None = None
    """Length of the run in passes over the data."""

    batch_size: int = 128
    """Pairs in a step, over all ranks."""

    chunk_size: int | None = None
    """Pairs that go through the model at a time on each rank. CLIP's gradients stay exact; ViLT
    samples what does not match, and ALBEF contrasts, within a chunk."""

    lr: float = 1e-3
    """Highest learning rate."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decays of AdamW's averages."""

    eps: float = 1e-8
    """AdamW's epsilon."""

    weight_decay: float = 0.01
    """Weight decay of the parameters that each system applies it to."""

    clip_norm: float | None = None
    """Scale gradients down to this norm."""

    schedule: Kind = "cosine"
    """Shape of the learning rate; see fastvlp.train.schedules."""

    warmup: int = 0
    """Warmup steps of the learning rate."""

    warmup_lr: float = 0.0
    """Learning rate at the start of warmup, of a step-wise schedule (staircase)."""

    final_lr: float = 0.0
    """Where the learning rate ends."""

    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Autocast dtype of matmuls. auto: bfloat16 where the CPU or GPU has instructions for it."""

    recompute: bool = False
    """Gradient checkpointing: keep block inputs only, and compute blocks again going back."""

    compile: str | None = None
    """Backend of torch.compile for the blocks, such as "inductor"."""

    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Over ranks: whole copies of the model, or shards of it (FSDP2)."""

    ema: float | None = None
    """Decay of a moving average of the weights, which is then what is evaluated and saved."""

    reference: bool = False
    """Compute with plain PyTorch in place of the kernels."""

    device: Device = "auto"
    """Where to compute."""

    seed: int = 0
    """Of weights, order and augmentation."""

    max_skipped: int = 25
    """Give up after this many steps in a row whose gradients were not finite."""

    save_every: int = 100
    """Steps between checkpoints."""

    keep: int = 2
    """Checkpoints to keep."""

    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the run's last checkpoint if there is one. never: refuse such a folder."""

    log_every: int = 10
    """Steps between lines of the log."""

    evaluate_every: int | None = None
    """Steps between evaluations; the best model is then kept in the run's folder `best`. By default
    ten times over a run of CLIP on shards with evaluation data, else only at the end."""

    log: Literal["tensorboard", "wandb"] = "tensorboard"
    """Where the numbers go beside the run's own log. wandb: to Weights & Biases as well, where the
    package wandb is installed; its variables, such as WANDB_PROJECT, count."""

    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        if isinstance(self.eval_data, str):
            self.eval_data = (self.eval_data,)
        if self.steps is None and self.epochs is None and not self.has_open_settings:
            raise ValueError("steps, epochs: expected one of the two, got neither")
        ranges.check(self)


@dataclass
class TrainClip(TrainConfig):
    """CLIP on the built-in OpenMoji images, or on shards of one's own."""

    system: ClassVar[str] = "clip"
    has_open_settings: ClassVar[bool] = True

    folder: Path = Path("runs/clip")
    model: str | None = None
    batch_size: int | None = None
    epochs: float | None = None
    lr: float | None = None

    init: Path | None = None
    """Weights to start from in place of random ones: the folder of a run, or a published
    checkpoint, file or folder. Sizes, normalisation of images and vocabulary are theirs."""

    activation: Literal["gelu", "quick_gelu"] | None = None
    """Of weights from open_clip to start from, which do not tell it."""

    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.2
    warmup: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init is None and self.activation is not None:
            raise ValueError(
                f"activation: expected none without --init; a size's own is part of its name, such "
                f"as ViT-B-32-quickgelu; got {self.activation}"
            )
        if self.init is not None and (self.model is not None or self.model_config is not None):
            given = "model" if self.model is not None else "model_config"
            raise ValueError(f"{given}: expected none, because the sizes are those of {self.init}")


@dataclass
class TrainVilt(TrainConfig):
    """ViLT on the built-in OpenMoji images."""

    system: ClassVar[str] = "vilt"
    # Images that do not match are drawn within a chunk.
    learns_by: ClassVar[frozenset[str]] = frozenset({"chunk_size"})

    folder: Path = Path("runs/vilt")
    model: str = "mini"
    epochs: float | None = 30.0
    batch_size: int = 64
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    schedule: Kind = "linear"
    warmup: int = 100

    mask_rate: float = 0.4
    """Share of a caption's tokens to mask, in whole words; 0.15 in the paper."""

    init: Path | None = None
    """Weights to start from in place of random ones: the folder of a run, or a published
    checkpoint, file or folder. Sizes and vocabulary are theirs; heads that they lack start anew."""


@dataclass
class TrainAlbef(TrainConfig):
    """ALBEF on the built-in OpenMoji images."""

    system: ClassVar[str] = "albef"
    # Each chunk contrasts with its own pairs and the queue.
    learns_by: ClassVar[frozenset[str]] = frozenset({"chunk_size"})

    folder: Path = Path("runs/albef")
    model: str = "mini"
    epochs: float | None = 20.0
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.02
    schedule: Kind = "staircase"
    warmup: int = 100
    warmup_lr: float = 1e-5
    final_lr: float = 1e-5

    mask_rate: float = 0.4
    """Share of a caption's tokens to mask; 0.15 in the paper, one token of captions like these."""

    alpha: float = 0.4
    """Weight of the momentum encoder's targets."""

    alpha_epochs: float = 1.0
    """Epochs over which alpha is warmed up from 0."""

    match_ids: bool = True
    """Pairs of equal id match one another, in the batch and in the queue, where a small data set
    comes by again before the queue has forgotten it."""

    queue_size: int | None = None
    """Pairs in the queue. By default the size of the model says."""

    momentum: float | None = None
    """Of the momentum encoder, for each step. By default the size of the model says."""

    candidates: int = 32
    """What the contrastive features choose for re-ranking, for each caption and each image."""

    vision_weights: Path | None = None
    """File of a pretrained ViT, timm's or DeiT's, for the image transformer to start from."""

    text_weights: Path | None = None
    """File of a pretrained BERT for the text and fusion layers to start from. The tokenizer is then
    BERT's own, unless one is given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ema is not None:
            raise ValueError(
                "ema: expected none; ALBEF has a moving average already, its momentum encoder, "
                f"whose decay is --momentum; got {self.ema}"
            )
        if self.parallel != "ddp":
            raise ValueError(
                "parallel: expected ddp; the momentum encoder and re-ranking, which calls fusion "
                f"unequally often on each rank, are not sharded; got {self.parallel}"
            )


def from_mapping(cls: type, values: Mapping[str, Any], where: str):
    """An instance of the dataclass `cls` with `values` over its defaults.

    Raises:
        ValueError: a name is not a field, or a value not of its type; `where` is named.
    """
    hints = typing.get_type_hints(cls)
    known = [field.name for field in fields(cls)]
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"{where}: unknown setting {unknown[0]!r}; known are {', '.join(known)}")
    return cls(**{k: _cast(v, hints[k], f"{where}: {k}") for k, v in values.items()})


def _cast(value: Any, hint: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _cast(value, next(a for a in arguments if a is not type(None)), where)
    if origin is Literal:
        if value in arguments:
            return value
        raise ValueError(f"{where}: expected one of {arguments}, got {value!r}")
    if origin is tuple and arguments[-1] is Ellipsis:
        # Once it was one value, or none.
        values = [] if value is None else value if isinstance(value, (list, tuple)) else [value]
        return tuple(_cast(v, arguments[0], where) for v in values)
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or len(value) != len(arguments):
            raise ValueError(f"{where}: expected {len(arguments)} values, got {value!r}")
        return tuple(_cast(v, h, where) for v, h in zip(value, arguments, strict=True))
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        # YAML reads 1e-3, without a point, as text.
        try:
            return float(value)
        except ValueError:
            raise ValueError(f"{where}: expected a number, got {value!r}") from None
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, a flat mapping.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such YAML.
    """
    yaml = require("yaml")
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: expected settings as `name: value`, got no YAML: {error}"
        ) from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected settings as `name: value`, got {type(values).__name__}")
    return values


def to_yaml(config: Any) -> str:
    """All settings as a YAML text that `read_yaml` and `from_mapping` turn back into them."""
    return require("yaml").safe_dump(plain(config), sort_keys=False)


def plain(config: Any) -> dict[str, Any]:
    """All settings as YAML and JSON have them."""
    return {name: _plain(value) for name, value in asdict(config).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value
