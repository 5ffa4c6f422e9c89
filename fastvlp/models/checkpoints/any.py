"""A model from whatever it was saved as: by `fastvlp.models.base.save`, a run, or a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastvlp.models import base
from fastvlp.models.albef import Albef
from fastvlp.models.files import read_json

from . import albef, clip, vilt
from ._files import read_state_dict
from ._report import LoadReport

# A weight that tells a published checkpoint's system, by every name that it has.
MARKS = {
    "albef": ("visual_encoder.pos_embed",),
    "vilt": ("transformer.patch_embed.proj.weight", "vilt.embeddings.cls_token"),
    "clip": (
        "visual.conv1.weight",
        "vision_model.embeddings.",
        "text_model.",
        "visual.trunk.",
        "text.transformer.",
    ),
}


# What weights do not tell, by system.
OPTIONS = {"clip": ("activation", "end_token"), "albef": ("token_types",), "vilt": ()}


def load_any(
    path: str | Path,
    *,
    activation: str | None = None,
    end_token: int | str | None = None,
    token_types: bool | None = None,
    **sizes: Any,
) -> tuple[base.Model, LoadReport | None]:
    """The model of a path, on the CPU, in evaluation mode, and what happened to a checkpoint.

    Args:
        path: the folder of a run; a model that `base.save` wrote, with or without its suffix; or a
            published checkpoint, a file or a folder, of CLIP (OpenAI, open_clip, transformers),
            ViLT (the authors', transformers) or ALBEF (the authors', LAVIS).
        activation: of open_clip's weights, which do not tell it: "gelu" or "quick_gelu".
        end_token: of CLIP's weights without a configuration, as `load_clip` takes it.
        token_types: of ALBEF's weights, as `albef.load_albef` takes it.
        sizes: `image_size`, to which positions are resized.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no known model, or one that needs more arguments.
    """
    path = Path(path)
    options = {"activation": activation, "end_token": end_token, "token_types": token_types}
    options = {name: value for name, value in options.items() if value is not None}
    saved = _saved(path)
    if saved is not None:
        if given := [*options, *sizes]:
            raise ValueError(
                f"{given[0]}: expected none, because {saved}.json says all; got a value"
            )
        return base.load(saved), None
    state = read_state_dict(path)
    kind = _kind(path, state)
    if other := [name for name in options if name not in OPTIONS[kind]]:
        raise ValueError(
            f"{other[0]}: expected none, {kind} has one form only; got {options[other[0]]!r}"
        )
    if kind == "clip":
        return clip.load_clip(path, **options, **sizes)
    if kind == "vilt":
        return vilt.load_vilt(path, **sizes)
    model = Albef(albef.config_of_shapes(state, **sizes))
    report = albef.load_albef(model, path, **options)
    return model.eval(), report


def _saved(path: Path) -> Path | None:
    """What `base.load` takes for a path, if it holds that.

    Raises:
        ValueError: the description beside the weights is damaged.
    """
    places = [path / "model"] if path.is_dir() else [path, path.with_suffix("")]
    for place in places:
        described = Path(f"{place}.json")
        if described.is_file() and Path(f"{place}.safetensors").is_file():
            if read_json(described).get("kind") in base.kinds():
                return place
    return None


def _kind(path: Path, state) -> str:
    for kind, marks in MARKS.items():
        if any(name.startswith(mark) for mark in marks for name in state):
            return kind
    raise ValueError(
        f"path: expected a CLIP, ViLT or ALBEF in {path}, got {len(state)} tensors such as "
        f"{sorted(state)[:3]}"
    )
