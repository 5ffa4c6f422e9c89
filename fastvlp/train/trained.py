"""A trained model with what belongs to it: its tokenizer, its images' transforms, its data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastvlp.data import RgbConversion
from fastvlp.data.images import recipes
from fastvlp.data.shards.write import atomic_file
from fastvlp.data.text import (
    BertTokenizer,
    CaptionTokenizer,
    ClipTokenizer,
    albef_tokenizer,
    vilt_tokenizer,
)
from fastvlp.data.text import files as tokenizer_files
from fastvlp.data.text.clip import MERGES_FILE
from fastvlp.models import albef, base, clip, vilt
from fastvlp.models.checkpoints import LoadReport, load_any
from fastvlp.models.files import read_json
from fastvlp.train import run_folder
from fastvlp.train.config import read_yaml
from fastvlp.train.tasks.vocabularies import bert_vocabulary

BUILT_IN = "openmoji"
IMAGE_VALUES = "preprocessor_config.json"
# Image transforms of evaluation, with their parameters of a model, by its system.
RECIPES = {
    "clip": ("clip_eval", lambda config: {"size": config.image_size}),
    "vilt": ("vilt_eval", lambda config: vilt_sizes(config)),
    "albef": ("albef_eval", lambda config: {"size": config.image_size}),
}
# Vocabularies that lie beside a model, by its system.
_VOCABULARIES = {
    "clip": ("tokenizer.json", "vocab.json", MERGES_FILE),
    "vilt": ("vocab.txt",),
    "albef": ("vocab.txt",),
}


def load(
    path: Path, activation: str | None = None, end_token: int | str | None = None
) -> tuple[base.Model, LoadReport | str | None]:
    """The model of a path, on the CPU, in evaluation mode, and what is to be said about it.

    Args:
        path: what `load_any` takes; of a run that did not end its newest whole checkpoint counts.
        activation, end_token: of published weights, as `load_any` takes them.

    Raises:
        FileNotFoundError, ValueError: there is no model, or it needs no, or other, options.
    """
    told = {"activation": activation, "end_token": end_token}
    found = run_folder.unsaved(path)
    if found is None:
        return load_any(path, **told)
    for name, value in told.items():
        if value is not None:
            raise ValueError(
                f"{name}: expected none, because the run in {path} says all; got {value}"
            )
    return found


def of_kind(model: base.Model, kind: str, path: Path) -> Any:
    """The model, if it is one of this kind to start a training from.

    Raises:
        ValueError: it is another one.
    """
    if model.kind != kind:
        raise ValueError(f"init: expected weights of {kind}, got those of {model.kind} in {path}")
    return model


def tokenizer(path: Path, model: base.Model, given: Path | None = None) -> Any:
    """The tokenizer of a model: from the file given, from beside the model, or the papers'.

    Raises:
        ValueError: it is of another kind, or has more ids than the model.
    """
    beside = [_folder(path) / name for name in _VOCABULARIES[model.system]]
    file = given or next((each for each in beside if each.is_file()), None)
    made = _TOKENIZERS[model.system](file, model.config)
    if made.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"tokenizer: expected at most the model's {model.config.vocab_size} ids, got "
            f"{made.vocab_size} of {file or 'the vocabulary of the papers'}; give --tokenizer"
        )
    return made


def _of_clip(file: Path | None, sizes: clip.ClipConfig) -> ClipTokenizer | CaptionTokenizer:
    length = sizes.context_length
    if file is None:
        return ClipTokenizer(context_length=length, truncate=True)
    made = tokenizer_files.for_clip(file, length)
    if made.context_length > length:
        raise ValueError(
            f"tokenizer: expected at most the model's {length} ids of a caption, got "
            f"{made.context_length} of {file}"
        )
    return made


def _of_vilt(file: Path | None, sizes: vilt.ViltConfig) -> BertTokenizer:
    source = bert_vocabulary(file, [])
    return vilt_tokenizer(source, padding="longest", context_length=sizes.context_length)


def _of_albef(file: Path | None, sizes: albef.AlbefConfig) -> BertTokenizer:
    return albef_tokenizer(bert_vocabulary(file, []), context_length=min(25, sizes.text_positions))


# Without a file that of the paper.
_TOKENIZERS: dict[str, Callable[..., Any]] = {
    "clip": _of_clip,
    "vilt": _of_vilt,
    "albef": _of_albef,
}


def vilt_sizes(sizes: vilt.ViltConfig) -> dict[str, int]:
    """Parameters of ViLT's image transforms: a side is at most 1333 / 800 of the other."""
    shorter = sizes.image_size
    return {
        "shorter": shorter,
        "longer": int(1333 / 800 * shorter),
        "multiple": sizes.patch_size,
    }


def keep_image_values(folder: Path, values: tuple[tuple[float, ...], ...]) -> None:
    """Write in a run's folder by what its images are normalised, where the paper has others."""
    if values != (recipes.CLIP_MEAN, recipes.CLIP_STD):
        mean, std = values
        described = {"image_mean": list(mean), "image_std": list(std)}
        with atomic_file(folder / IMAGE_VALUES) as file:
            file.write(json.dumps(described, indent=2).encode() + b"\n")


def recipe(path: Path, model: base.Model) -> recipes.Recipe:
    """The transforms of images that a model is evaluated with, normalised as in its training."""
    name, sizes = RECIPES[model.system]
    mean, std = image_values(path, model.system)
    return recipes.recipe(name, **sizes(model.config), mean=mean, std=std)


def image_values(path: Path, system: str = "clip") -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation that the images of a model were normalised by in its training.

    Of a published model what stands beside it, in open_clip's or transformers' file; else those of
    its system's paper.
    """
    if settings(path).get("data") == BUILT_IN:
        return recipes.HALF, recipes.HALF
    folder = _folder(path)
    for file, inside, names in (
        ("open_clip_config.json", "preprocess_cfg", ("mean", "std")),
        (IMAGE_VALUES, None, ("image_mean", "image_std")),
    ):
        if not (folder / file).is_file():
            continue
        described = read_json(folder / file)
        described = described if inside is None else described.get(inside) or {}
        if all(isinstance(described.get(name), list) for name in names):
            mean, std = (tuple(map(float, described[name])) for name in names)
            return mean, std
    usual = recipes.RECIPES[RECIPES[system][0]]
    return usual.mean, usual.std


def conversion(
    path: Path, convert: str | None = None, background: str | None = None
) -> RgbConversion:
    """How images become 8-bit RGB: as is asked for, else as the model's own run had it."""
    own = settings(path)
    return RgbConversion(
        background=background or own.get("background", "white"),
        method=convert or own.get("convert", "range"),
    )


def own_data(path: Path) -> tuple[str, ...]:
    """The evaluation data of the run that a model is of, or none."""
    own = settings(path)
    if own.get("data") == BUILT_IN:
        return (BUILT_IN,)
    given = own.get("eval_data") or ()
    return (given,) if isinstance(given, str) else tuple(given)


def settings(path: Path) -> dict[str, Any]:
    """Those of the run that a model is of; none where it is of no run."""
    file = _folder(path) / "config.yaml"
    return read_yaml(file) if file.is_file() else {}


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent
