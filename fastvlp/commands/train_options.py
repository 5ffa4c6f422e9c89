"""The options of ``fastvlp train`` in groups, made from the settings of a system.

Settings are one flat dataclass with a text below each field. For the command line they are put into
a dataclass for each group, whose names are the titles in --help; the options stay flat.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import typing
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from fastvlp.models import albef, clip, vilt
from fastvlp.train.config import TrainConfig

# The settings of each group, in the order of --help; a system has some of them.
GROUPS: dict[str, tuple[str, ...]] = {
    "model": (
        "model", "model_config", "init", "activation", "tokenizer", "vision_weights",
        "text_weights",
    ),
    "data": ("data", "eval_data", "verify", "max_broken", "convert", "background"),
    "length": ("epochs", "steps", "batch_size", "chunk_size"),
    "learning": (
        "lr", "schedule", "warmup", "warmup_lr", "final_lr", "betas", "eps", "weight_decay",
        "clip_norm", "ema", "mask_rate", "alpha", "alpha_epochs", "match_ids", "queue_size",
        "momentum", "max_skipped", "seed",
    ),
    "machine": ("device", "precision", "parallel", "recompute", "compile", "reference"),
    "output": (
        "folder", "resume", "save_every", "keep", "evaluate_every", "candidates", "log",
        "log_every", "progress",
    ),
}  # fmt: skip
_NAMES = {"clip": clip.CONFIGS, "vilt": vilt.CONFIGS, "albef": albef.CONFIGS}


def parse(cls: type[TrainConfig], args: Sequence[str], default: TrainConfig, **options: Any):
    """The settings that options spell; `options` are those of `tyro.cli`.

    Args:
        cls: the settings of a system.
        args: the command line.
        default: values of what is not given.
    """
    grouped, values = _grouped(cls, default)
    found = tyro.cli(
        tyro.conf.OmitArgPrefixes[grouped], args=list(args), default=grouped(**values), **options
    )
    parts = [getattr(found, field.name) for field in dataclasses.fields(found)]
    return cls(**{k: v for part in parts for k, v in vars(part).items()})


def _grouped(cls: type[TrainConfig], default: TrainConfig) -> tuple[type, dict[str, Any]]:
    """A dataclass with a dataclass for each group, and the groups with their values."""
    hints, texts = typing.get_type_hints(cls), field_texts(cls)
    texts["model"] += f" Names: {', '.join(_NAMES[cls.system])}."
    if cls.system == "clip":
        texts["model"] += " open_clip's spelling, such as ViT-B-32, is its model."
    known = [field.name for field in dataclasses.fields(cls)]
    kinds, values = [], {}
    for title, names in GROUPS.items():
        own = [name for name in names if name in known]
        kind = dataclasses.make_dataclass(
            "_Group",
            [(n, Annotated[hints[n], tyro.conf.arg(help=texts[n])]) for n in own],
            namespace={"__doc__": ""},
        )
        kinds.append((title, kind))
        values[title] = kind(**{name: getattr(default, name) for name in own})
    return dataclasses.make_dataclass("_Settings", kinds), values


def field_texts(cls: type) -> dict[str, str]:
    """The text below each field of a dataclass, those of its bases included."""
    texts: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(each):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
        body = tree.body
        for field, below in zip(body, body[1:], strict=False):
            named = isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
            if named and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                texts[field.target.id] = " ".join(str(below.value.value).split())
    return texts
