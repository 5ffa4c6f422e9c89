"""A trained model with what belongs to it: its tokenizer, its images' transforms, its data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastvlp.data import RgbConversion
from fastvlp.data.images import recipes
from fastvlp.data.text.clip import MERGES_FILE
from fastvlp.models import base
from fastvlp.models.checkpoints import LoadReport, load_any
from fastvlp.models.files import read_json
from fastvlp.train import run_folder
from fastvlp.train.config import read_yaml
from fastvlp.train.tasks import albef_setup, clip_setup, vilt_setup

BUILT_IN = "openmoji"
# Image transforms of evaluation, with their parameters of a model.
RECIPES = {
    "clip": ("clip_eval", lambda config: {"size": config.image_size}),
    "vilt": ("vilt_eval", vilt_setup.recipe_sizes),
    "albef": ("albef_eval", lambda config: {"size": config.image_size}),
}
# Vocabularies that lie beside a model, by its kind.
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


def tokenizer(path: Path, model: base.Model, given: Path | None = None) -> Any:
    """The tokenizer of a model: from the file given, from beside the model, or the papers'.

    Raises:
        ValueError: it is of another kind, or has more ids than the model.
    """
    beside = [_folder(path) / name for name in _VOCABULARIES[model.kind]]
    file = given or next((each for each in beside if each.is_file()), None)
    setup = {"clip": clip_setup, "vilt": vilt_setup, "albef": albef_setup}[model.kind]
    made = setup.tokenizer_of(file, model.config)
    if made.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"tokenizer: expected at most the model's {model.config.vocab_size} ids, got "
            f"{made.vocab_size} of {file or 'the vocabulary of the papers'}; give --tokenizer"
        )
    return made


def recipe(path: Path, model: base.Model) -> recipes.Recipe:
    """The transforms of images that a model is evaluated with, normalised as in its training."""
    name, sizes = RECIPES[model.kind]
    mean, std = image_values(path, model.kind)
    return recipes.recipe(name, **sizes(model.config), mean=mean, std=std)


def image_values(path: Path, kind: str = "clip") -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation that the images of a model were normalised by in its training.

    Of a published model what stands beside it, in open_clip's or transformers' file; else those of
    its system's paper.
    """
    if settings(path).get("data") == BUILT_IN:
        return recipes.HALF, recipes.HALF
    folder = _folder(path)
    for file, inside, names in (
        ("open_clip_config.json", "preprocess_cfg", ("mean", "std")),
        ("preprocessor_config.json", None, ("image_mean", "image_std")),
    ):
        if not (folder / file).is_file():
            continue
        described = read_json(folder / file)
        described = described if inside is None else described.get(inside) or {}
        if all(isinstance(described.get(name), list) for name in names):
            mean, std = (tuple(map(float, described[name])) for name in names)
            return mean, std
    usual = recipes.RECIPES[RECIPES[kind][0]]
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


def own_data(path: Path) -> str | None:
    """The evaluation data of the run that a model is of, or None."""
    own = settings(path)
    return BUILT_IN if own.get("data") == BUILT_IN else own.get("eval_data")


def settings(path: Path) -> dict[str, Any]:
    """Those of the run that a model is of; none where it is of no run."""
    file = _folder(path) / "config.yaml"
    return read_yaml(file) if file.is_file() else {}


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent
