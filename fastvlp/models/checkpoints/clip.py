"""CLIP's published checkpoints: OpenAI's, open_clip's and those of transformers' CLIPModel."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvlp.models.clip import Clip, ClipConfig
from fastvlp.models.files import read_json

from ._clip_config import LARGEST, config_of_mapping, config_of_name, config_of_shapes
from ._files import NAMES, read_state_dict, unwrap
from ._positions import resize_grid_positions, resize_text_positions
from ._report import LoadReport, apply

OPENAI, OPEN_CLIP, TRANSFORMERS = "OpenAI CLIP", "open_clip CLIP", "transformers CLIPModel"
# Numbers in OpenAI's archives beside the weights.
OPENAI_SIZES = ("input_resolution", "context_length", "vocab_size")
CONFIG_FILES = {OPEN_CLIP: "open_clip_config.json", TRANSFORMERS: "config.json"}
# Names that only checkpoints of other architectures have.
OTHERS = {
    r"visual\.trunk\.": "an image tower of timm",
    r"text\.(?!transformer\.resblocks|token_embedding|positional_embedding|ln_final|text_projection"
    r"|cls_emb)": "a text tower of transformers",
    r"text_decoder\.": "the text decoder of CoCa",
    r"visual\.attn_pool\.": "an image tower with attentional pooling",
    r"(text\.)?cls_emb": "a text tower with a class token",
    r"text\.text_projection\.|text_projection\.bias": "a text projection with a bias",
    r"logit_bias": "SigLIP's bias of the logits",
    r"vision_model\.head\.": "SigLIP's pooling head",
    r"text_model\.(embeddings\.word_embeddings|encoder\.layer\.)": "a text tower of BERT, as "
    "ChineseCLIP and BLIP have",
    r"text_model\.roberta\.": "a text tower of RoBERTa, as AltCLIP has",
    r"vision_model\.encoder\.layers\.\d+\.self_attn\.qkv\.": "the image tower of BLIP",
    r".*\.ls_[12]\.gamma": "layer scale",
}


# For each tower, what every CLIP has in it, and what a checkpoint without it may be.
TOWERS = {
    "text": (
        ("token_embedding.weight", "positional_embedding", "ln_final.weight", "text_projection")
        + ("transformer.resblocks.0.mlp.c_fc.weight",),
        "CLIPVisionModelWithProjection has no text tower",
    ),
    "image": (
        ("visual.conv1.weight", "visual.positional_embedding", "visual.ln_pre.weight")
        + ("visual.proj", "visual.transformer.resblocks.0.mlp.c_fc.weight"),
        "CLIPTextModelWithProjection has no image tower, CLIPA's has no ln_pre",
    ),
}
RESNET = ("visual.layer1.0.conv1.weight", "visual.attnpool.positional_embedding")


def load_clip(
    path_or_state: str | Path | Mapping[str, Tensor],
    *,
    config: ClipConfig | Mapping[str, Any] | None = None,
    name: str | None = None,
    activation: str | None = None,
    end_token: int | str | None = None,
    strict: bool = True,
    image_size: int | None = None,
    context_length: int | None = None,
) -> tuple[Clip, LoadReport]:
    """A published checkpoint as a `Clip`, float32 on the CPU, in evaluation mode.

    The activation is never guessed: OpenAI's weights are known to use quick_gelu, transformers says
    it in config.json and open_clip in its configuration; open_clip's weights alone do not tell.
    Nor do weights tell at which token a text is read, unless the vocabulary is that of published
    models.

    Args:
        path_or_state: what `read_state_dict` reads, or a state dict. In a folder of a model hub
            config.json or open_clip_config.json is read as well.
        config: the sizes; a ``ClipConfig``, or the content of open_clip's or transformers' file.
            None takes them from the file in the folder, or from shapes as OpenAI does.
        name: in place of `config`, a key of ``CONFIGS`` or open_clip's spelling of it. Says the
            activation only if it ends in "-quickgelu".
        activation: "gelu" or "quick_gelu", for open_clip's weights.
        end_token: where a text is read, for weights without a configuration: "largest", at the
            largest id of the text, or at the first token of this id.
        strict: raise if a tensor is missing or unused. Otherwise the report tells.
        image_size, context_length: other sizes than the checkpoint's. Position embeddings are
            resized as in open_clip: bicubic with antialias beside the class token, and linear.

    Returns:
        the model, and what happened.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the format is not known or not supported, the activation is not known, sources
            contradict one another, or tensors do not fit.
    """
    if config is not None and name is not None:
        raise ValueError("name: expected config or name, got both")
    mapping = isinstance(path_or_state, Mapping)
    state = unwrap(path_or_state) if mapping else read_state_dict(path_or_state)
    source = _recognise(state)
    state = _RENAMINGS[source](state)
    _check_towers(state)
    beside = None if mapping else _config_beside(Path(path_or_state), source)
    made, notes = _decide(state, source, config, name, activation, end_token, beside)
    state, made, reshaped = _resize(state, made, image_size, context_length)
    model = Clip(made)
    report = apply(
        model, state, source=source, strict=strict, may_miss=["*.num_batches_tracked"],
        reshaped=reshaped, notes=notes,
    )  # fmt: skip
    return model.eval(), report


def _recognise(state: Mapping[str, Tensor]) -> str:
    for pattern, what in OTHERS.items():
        found = next((key for key in state if re.match(pattern, key)), None)
        if found is not None:
            raise ValueError(
                f"state: the checkpoint has {what} ({found}), which fastvlp's CLIP does not; "
                "supported are the plain towers of OpenAI, open_clip and transformers' CLIPModel"
            )
    if any(key.startswith(("vision_model.", "text_model.")) for key in state):
        return TRANSFORMERS
    if "visual.conv1.weight" in state or "token_embedding.weight" in state:
        return OPENAI if "input_resolution" in state else OPEN_CLIP
    raise ValueError(
        "state: expected a CLIP of OpenAI, open_clip (visual.conv1.weight) or transformers "
        f"(vision_model.embeddings.class_embedding), got {len(state)} tensors such as "
        f"{sorted(state)[:3]}"
    )


def _check_towers(state: Mapping[str, Tensor]) -> None:
    """Refuses a renamed state without what tells the sizes, or is decisive for a tower."""
    for tower, (names, hint) in TOWERS.items():
        if tower == "image" and any(name in state for name in RESNET):
            names = RESNET
        lacking = [name for name in names if name not in state]
        if lacking:
            raise ValueError(
                f"state: expected both towers of a CLIP, but its {tower} tower is not there or not "
                f"CLIP's, it lacks {', '.join(lacking)} ({hint})"
            )


def _config_beside(path: Path, source: str) -> ClipConfig | None:
    folder = path if path.is_dir() else path.parent
    file = folder / CONFIG_FILES.get(source, "")
    if not file.is_file() or not (path.is_dir() or path.name in NAMES):
        return None
    return config_of_mapping(read_json(file))


def _decide(
    state, source, config, name, activation, end_token, beside
) -> tuple[ClipConfig, list[str]]:
    """The configuration, and notes on where its parts that weights do not show come from."""
    said = {"the argument activation": activation}
    if source == OPENAI:
        said["OpenAI's release"] = "quick_gelu"
    if beside is not None:
        said[CONFIG_FILES[source]] = beside.activation
    made, notes = beside, []
    if name is not None:
        made, said[f"the name {name}"] = config_of_name(name)
    elif config is not None:
        made = config if isinstance(config, ClipConfig) else config_of_mapping(config)
        said["the argument config"] = made.activation
    said = {where: value for where, value in said.items() if value is not None}
    if not said:
        raise ValueError(
            f"activation: {source} weights work with the one activation that they were trained "
            "with, which they do not show. Pass activation='gelu' (open_clip's default), "
            "activation='quick_gelu' (OpenAI's weights and names with -quickgelu), or config="
        )
    if len(set(said.values())) > 1:
        raise ValueError(f"activation: the sources contradict one another: {said}")
    if made is None:
        made, notes = config_of_shapes(state, LARGEST if source == OPENAI else end_token)
    if end_token is not None and made.end_token != (None if end_token == LARGEST else end_token):
        raise ValueError(
            f"end_token: the model's configuration says {made.end_token or LARGEST!r}, got "
            f"{end_token!r}"
        )
    chosen = next(iter(said.values()))
    made = dataclasses.replace(made, activation=chosen)
    return made, [f"activation {chosen}, from {' and '.join(said)}", *notes]


def _resize(state, config: ClipConfig, image_size: int | None, context_length: int | None):
    """State and configuration at the sizes asked for, and what was reshaped."""
    resized = {}
    if image_size is not None:
        if config.is_resnet and image_size != config.image_size:
            raise ValueError(
                f"image_size: the attention pool of a ResNet is made for {config.image_size}, "
                f"got {image_size}"
            )
        config = dataclasses.replace(config, image_size=image_size)
    if image_size is not None and not config.is_resnet:
        side = image_size // config.patch_size
        key = "visual.positional_embedding"
        resized[key] = resize_grid_positions(state[key], (side, side))
    if context_length is not None:
        config = dataclasses.replace(config, context_length=context_length)
        key = "positional_embedding"
        resized[key] = resize_text_positions(state[key], context_length)
    reshaped = [
        (key, tuple(state[key].shape), tuple(value.shape))
        for key, value in resized.items()
        if value is not state[key]
    ]
    return state | resized, config, reshaped


def _from_openai(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key not in OPENAI_SIZES}


def _from_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CLIP, or CustomTextCLIP, whose text tower is a module of its own."""
    out = {key.removeprefix("text."): value for key, value in state.items()}
    if "logit_scale" in out:  # of one element with nonscalar_logit_scale
        out["logit_scale"] = out["logit_scale"].reshape(())
    return out


# transformers' name of a tensor → fastvlp's; {v} is "visual." for the image tower.
_OF_TRANSFORMERS = [
    (r"^(vision|text)_model\.encoder\.layers\.(\d+)\.", r"\1_model.transformer.resblocks.\2."),
    (r"self_attn\.out_proj", "attn.out_proj"),
    (r"layer_norm([12])\.", r"ln_\1."),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
    (r"^vision_model\.pre_layrnorm", "visual.ln_pre"),
    (r"^vision_model\.post_layernorm", "visual.ln_post"),
    (r"^text_model\.final_layer_norm", "ln_final"),
    (r"embeddings\.patch_embedding", "conv1"),
    (r"embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"embeddings\.(token|class)_embedding", r"\1_embedding"),
    (r"^vision_model\.", "visual."),
    (r"^text_model\.", ""),
    (r"^visual_projection\.weight", "visual.proj"),
    (r"^text_projection\.weight", "text_projection"),
]


def _from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    out = {}
    for key, value in state.items():
        if key.endswith("embeddings.position_ids"):
            continue
        for old, new in _OF_TRANSFORMERS:
            key = re.sub(old, new, key)
        out[key] = value.T if key in ("visual.proj", "text_projection") else value
    for key in [key for key in out if ".self_attn.q_proj." in key]:
        parts = [key.replace(".q_proj.", f".{x}_proj.") for x in "qkv"]
        joint = key.replace("self_attn.q_proj.", "attn.in_proj_")
        if all(part in out for part in parts):
            out[joint] = torch.cat([out.pop(part) for part in parts])
    return out


_RENAMINGS = {
    OPENAI: _from_openai,
    OPEN_CLIP: _from_open_clip,
    TRANSFORMERS: _from_transformers,
}
