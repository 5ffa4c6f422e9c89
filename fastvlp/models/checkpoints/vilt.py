"""ViLT from its original release and from transformers, and its blocks from a ViT of timm.

Both formats of ViLT hold the same model under different names (see `from_transformers`), with one
difference that no weight shows: the layer norms of the transformer have epsilon 1e-6 in the
original and 1e-12 in transformers. The model gets the one of its format, and the report says so.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvlp.models.files import read_json
from fastvlp.models.vilt import Vilt, ViltConfig

from ._files import read_state_dict, unwrap
from ._positions import resize_grid_positions
from ._report import LoadReport, apply
from ._vit import CLASSIFIERS, plain_vit

# The first weights of each head under this library's names.
HEADS = {
    "mlm": "mlm_score.",
    "itm": "itm_score.",
    "vqa": "vqa_classifier.",
    "nlvr2": "nlvr2_classifier.",
    "retrieval": "rank_output.",
    "tokens": "token_classifier.",
}
LAYER_NAMES = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
PREFIXES = {
    "vilt.embeddings.text_embeddings.": "text_embeddings.",
    "vilt.embeddings.cls_token": "transformer.cls_token",
    "vilt.embeddings.patch_embeddings.projection.": "transformer.patch_embed.proj.",
    "vilt.embeddings.position_embeddings": "transformer.pos_embed",
    "vilt.embeddings.token_type_embeddings.": "token_type_embeddings.",
    "vilt.layernorm.": "transformer.norm.",
    "vilt.pooler.": "pooler.",
    "mlm_score.decoder.bias": "mlm_score.bias",
}
TRANSFORMERS_EPS = 1e-12
WORDS = "text_embeddings.word_embeddings.weight"
KINDS = "token_type_embeddings.weight"
POSITIONS = "transformer.pos_embed"


def load_vilt(
    source: str | Path | Mapping[str, Tensor],
    *,
    settings: Mapping[str, Any] | None = None,
    strict: bool = True,
    **overrides: Any,
) -> tuple[Vilt, LoadReport]:
    """A model with the weights of an original or a transformers ViLT, in evaluation mode.

    Sizes are read off the weights. Heads are those of the checkpoint, or of `tasks`: then heads
    that the checkpoint lacks keep their initialisation (ranking starts from image-text matching)
    and others are left out, as the report says.

    Args:
        source: what `read_state_dict` reads, or a state dict.
        settings: transformers' configuration; by default the config.json beside the weights.
        strict: raise where weights are missing or unused but for those heads.
        overrides: fields of `ViltConfig`, such as tasks=("nlvr2",), which adds the row of the
            second image, or image_size=480, which resizes the positions. The weights do not tell
            `heads` (without settings width / 64), `dropout` or `max_image_len` (without settings
            0.1 and -1).

    Raises:
        FileNotFoundError, ValueError: there is no checkpoint, or it is no ViLT, or does not fit.
    """
    if isinstance(source, Mapping):
        state = unwrap(dict(source))
    else:
        state, settings = read_state_dict(source), settings or _settings_beside(Path(source))
    state = {k: v for k, v in state.items() if not k.endswith((".position_ids", ".token_type_ids"))}
    if "embeddings.text_embeddings.word_embeddings.weight" in state:  # ViltModel alone
        state = {f"vilt.{k}": v for k, v in state.items()}
    named = "transformers ViLT" if any(k.startswith("vilt.") for k in state) else "original ViLT"
    notes: list[str] = []
    if named == "transformers ViLT":
        state = from_transformers(state, notes)
    if not {WORDS, KINDS, POSITIONS} <= state.keys():
        raise ValueError("source: expected the weights of a ViLT, original or of transformers")
    config = _config(state, named, settings, overrides, notes)
    model = Vilt(config).eval()
    reshaped = _fit(state, config, notes)
    report = apply(
        model,
        state,
        source=named,
        strict=strict,
        may_miss=_absent(state, config, notes),
        may_skip=["mpp_score.*", *(f"{HEADS[t]}*" for t in HEADS if t not in config.tasks)],
        heads=[f"{head}*" for head in HEADS.values()],
        reshaped=reshaped,
        notes=notes,
    )
    return model, report


def from_transformers(state: Mapping[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """The weights of any of transformers' ViLT classes by the names of the original."""
    out: dict[str, Tensor] = {}
    shared = [v.shape for k, v in state.items() if k == "classifier.0.weight"]
    pair = bool(shared) and shared[0][0] == shared[0][1]  # both pooled vectors in, as many out
    classifier = "nlvr2_classifier" if pair else "vqa_classifier"
    for name, value in state.items():
        prefix = next((p for p in PREFIXES if name.startswith(p)), None)
        if prefix:
            out[PREFIXES[prefix] + name.removeprefix(prefix)] = value
        elif name.startswith("vilt.encoder.layer."):
            number, _, rest = name.removeprefix("vilt.encoder.layer.").partition(".")
            part, _, kind = rest.rpartition(".")
            block = f"transformer.blocks.{number}"
            if part in LAYER_NAMES:
                out[f"{block}.{LAYER_NAMES[part]}.{kind}"] = value
            elif part == "attention.attention.query":
                projections = (name.replace("query", x) for x in ("query", "key", "value"))
                joint = torch.cat([state[projection] for projection in projections])
                out[f"{block}.attn.qkv.{kind}"] = joint
            elif part not in ("attention.attention.key", "attention.attention.value"):
                out[name] = value
        elif name.startswith("classifier."):
            rest = name.removeprefix("classifier.")
            head = classifier if "." in rest else "token_classifier"
            out[f"{head}.{rest}"] = value
        else:
            out[name] = value
    if "mlm_score.transform.dense.weight" in out and "mlm_score.decoder.weight" not in out:
        out["mlm_score.decoder.weight"] = out[WORDS]
        notes.append("mlm_score.decoder.weight is absent, so tied: a copy of the word embeddings")
    return out


def initialise_from_vit(
    model: Vilt, source: str | Path | Mapping[str, Tensor], *, strict: bool = True
) -> LoadReport:
    """Puts the weights of a timm ViT or a DeiT into the transformer; the rest stays as it is.

    ViLT begins with timm's vit_base_patch32_384. Positions are resized to the model's grid; the
    classifier is left out, and so are a distilled DeiT's second token and its position.

    Raises:
        FileNotFoundError, ValueError: there is no checkpoint, or it does not fit.
    """
    notes: list[str] = []
    state = unwrap(dict(source)) if isinstance(source, Mapping) else read_state_dict(source)
    state = plain_vit(state, notes)
    if model.config.eps != 1e-6:
        notes.append(f"timm's ViT has layer norm eps 1e-6, the model {model.config.eps:g}")
    state = {f"transformer.{k}": v for k, v in state.items()}
    reshaped = _fit_positions(state, model.config)
    return apply(
        model,
        state,
        source="timm ViT",
        strict=strict,
        may_miss=[k for k in model.state_dict() if not k.startswith("transformer.")],
        may_skip=[f"transformer.{name}" for name in CLASSIFIERS],
        reshaped=reshaped,
        notes=notes,
    )


def _settings_beside(path: Path) -> dict[str, Any] | None:
    file = path / "config.json" if path.is_dir() else path.with_name("config.json")
    return read_json(file) if file.exists() else None


def _config(state, named, settings, overrides, notes) -> ViltConfig:
    width, patch = state["transformer.cls_token"].shape[-1], _side(state)[1]
    found: dict[str, Any] = {
        "image_size": _side(state)[0] * patch,
        "patch_size": patch,
        "width": width,
        "layers": len({k.split(".")[2] for k in state if k.startswith("transformer.blocks.")}),
        "vocab_size": state[WORDS].shape[0],
        "context_length": state["text_embeddings.position_embeddings.weight"].shape[0],
        "tasks": tuple(t for t, head in HEADS.items() if any(k.startswith(head) for k in state)),
        "max_image_len": -1,
    }
    for field, name in (("answers", "vqa_classifier.3"), ("token_labels", "token_classifier")):
        if f"{name}.weight" in state:
            found[field] = state[f"{name}.weight"].shape[0]
    if named == "transformers ViLT":
        found |= _from_settings(settings or {})
        notes.append(
            f"layer norm eps {found['eps']:g}, as transformers runs it; the original has 1e-6 in "
            "the transformer, for its weights pass eps=1e-6"
        )
    else:
        notes.append("layer norm eps 1e-6 in the transformer, as the original")
    if "heads" not in found | overrides:
        if width % 64:
            raise ValueError(f"heads: expected their number, the weights of width {width} do not")
        found["heads"] = width // 64
        notes.append(f"{width // 64} heads of 64, as in all published models")
    if "tasks" in overrides:
        overrides = overrides | {"tasks": tuple(overrides["tasks"])}
    return dataclasses.replace(ViltConfig(**found), **overrides)


def _from_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    known = {"model_type": "vilt", "hidden_act": "gelu", "qkv_bias": True, "num_channels": 3}
    for name, expected in known.items():
        if settings.get(name, expected) != expected:
            raise ValueError(f"settings: expected {name} {expected!r}, got {settings[name]!r}")
    eps = settings.get("layer_norm_eps", TRANSFORMERS_EPS)
    found = {"eps": eps, "text_eps": eps}
    for ours, theirs in (
        ("heads", "num_attention_heads"),
        ("dropout", "hidden_dropout_prob"),
        ("max_image_len", "max_image_length"),
    ):
        if theirs in settings:
            found[ours] = settings[theirs]
    return found


def _side(state: Mapping[str, Tensor]) -> tuple[int, int]:
    """Patches on a side of the positions' square, and pixels on a side of a patch."""
    patch = state["transformer.patch_embed.proj.weight"].shape[-1]
    return math.isqrt(state[POSITIONS].shape[1] - 1), patch


def _fit(state: dict[str, Tensor], config: ViltConfig, notes: list[str]) -> list[tuple]:
    """Gives the state the model's positions, modalities and ranking head; what was reshaped."""
    reshaped = _fit_positions(state, config)
    kinds, rows = state[KINDS], config.modalities
    if len(kinds) != rows:
        state[KINDS] = torch.cat([kinds, kinds[1:2]])[:rows] if len(kinds) < rows else kinds[:rows]
        reshaped.append((KINDS, tuple(kinds.shape), tuple(state[KINDS].shape)))
        if len(kinds) < rows:
            notes.append("the second image's modality embedding starts from the first's")
    if "retrieval" in config.tasks and "rank_output.weight" not in state:
        if "itm_score.fc.weight" in state:
            for kind in ("weight", "bias"):
                state[f"rank_output.{kind}"] = state[f"itm_score.fc.{kind}"][1:]
            notes.append("rank_output is row 1 of itm_score.fc")
    return reshaped


def _fit_positions(state: dict[str, Tensor], config: ViltConfig) -> list[tuple]:
    old, side = state[POSITIONS], config.image_size // config.patch_size
    new = resize_grid_positions(old, (side, side), mode="bilinear", antialias=False)
    state[POSITIONS] = new
    return [] if new is old else [(POSITIONS, tuple(old.shape), tuple(new.shape))]


def _absent(state: Mapping[str, Tensor], config: ViltConfig, notes: list[str]) -> list[str]:
    """Patterns of the weights that this checkpoint need not have."""
    heads = [HEADS[task] for task in config.tasks]
    new = [head for head in heads if not any(k.startswith(head) for k in state)]
    if "pooler.dense.weight" not in state:
        new.append("pooler.")
    notes += [
        f"{prefix[:-1]} is not in the checkpoint and keeps its initialisation" for prefix in new
    ]
    return [f"{prefix}*" for prefix in new]
