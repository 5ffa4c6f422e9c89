"""The sizes of a CLIP checkpoint: from shapes, from a name, or from the configuration beside it.

Neither the number of heads nor the activation can be seen in the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from fastvlp.models.clip import CONFIGS, QUICK, ClipConfig
from fastvlp.models.clip import config_of_name as sizes_of_name

# transformers' values for what a config.json leaves out.
TRANSFORMERS_TEXT = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
    "eos_token_id": 49407,
}
TRANSFORMERS_VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "num_channels": 3,
}
TRANSFORMERS_BOTH = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
# transformers' models of these names and configurations: whether an end token of 2 stands for the
# largest id of a text, as CLIP's early files mean it.
TRANSFORMERS_TYPES = {"clip": True, "metaclip_2": False}
# open_clip's values.
OPEN_CLIP_VISION = {
    "layers": 12,
    "width": 768,
    "head_width": 64,
    "mlp_ratio": 4.0,
    "patch_size": 16,
    "image_size": 224,
}
OPEN_CLIP_TEXT = {
    "context_length": 77,
    "vocab_size": 49408,
    "width": 512,
    "heads": 8,
    "layers": 12,
    "mlp_ratio": 4.0,
    "pool_type": "argmax",
    "eos_id": 2,
}
# What else open_clip may say, with the values by which this CLIP computes the same.
_EITHER = {
    "ls_init_value": (None,),
    "final_ln_after_pool": (False,),
    "act_kwargs": (None, {}),
    "norm_kwargs": (None, {}, {"eps": 1e-5}),
    "block_type": (None, "default"),
}
OPEN_CLIP_SAME = {
    "vision_cfg": _EITHER
    | {"pool_type": ("tok",), "pos_embed_type": ("learnable",), "timm_model_name": (None,)},
    "text_cfg": _EITHER
    | {"pool_type": ("argmax", "eos"), "proj_type": ("linear",), "hf_model_name": (None,)},
    "model_cfg": {"init_logit_bias": (None,), "multimodal_cfg": (None,)},
}
# And what changes nothing that is computed of these towers.
OPEN_CLIP_OTHER = (
    "patch_dropout attn_pooler_queries attn_pooler_heads output_tokens timm_pool timm_proj "
    "timm_proj_bias timm_drop timm_model_pretrained hf_tokenizer_name tokenizer_mode "
    "tokenizer_kwargs pad_id hf_model_pretrained hf_proj_type hf_pooler_type "
    "embed_dim vision_cfg text_cfg quick_gelu custom_text init_logit_scale nonscalar_logit_scale "
    "output_dict cast_dtype"
).split()
# Where a text is read by the vocabulary of published models, CLIP's own and those of MetaCLIP 2,
# XLM-V's and mT5's: at its largest id, or at the end token of this id.
LARGEST = "largest"
END_TOKENS = {49408: LARGEST, 901629: 2, 250100: 1}


def config_of_name(name: str) -> tuple[ClipConfig, str | None]:
    """The sizes of a name, and the activation if the name says it, as "ViT-B-32-quickgelu" does.

    Raises:
        ValueError: the name is neither a key of ``CONFIGS`` nor open_clip's spelling of one.
    """
    config = sizes_of_name(name)
    return config, config.activation if name.endswith(QUICK) else None


def config_of_shapes(
    state: Mapping[str, Tensor], end_token: int | str | None = None
) -> tuple[ClipConfig, list[str]]:
    """The sizes of a state dict by fastvlp's names, and notes on what was guessed.

    OpenAI's rule gives 64 channels to a head; image towers of another width per head are known by
    their width from ``CONFIGS``. The end token is the given one, or that of a known vocabulary.

    Raises:
        ValueError: the end token or the number of heads is not known.
    """
    vocab_size = state["token_embedding.weight"].shape[0]
    if end_token is None and vocab_size not in END_TOKENS:
        raise ValueError(
            f"end_token: the weights do not tell where a text is read, and a vocabulary of "
            f"{vocab_size} is none of {sorted(END_TOKENS)}, whose models are known. Pass config=, "
            "put the model's configuration file beside the weights, or pass end_token='largest' "
            "(the largest id of each text, open_clip's default) or the end token's id"
        )
    end_token = END_TOKENS[vocab_size] if end_token is None else end_token
    text_width = state["ln_final.weight"].shape[0]
    vision = _vision_of_shapes(state)
    notes = [
        f"{heads} {tower} heads, from the width {width}: the weights do not tell"
        for tower, heads, width in (
            ("vision", vision["vision_heads"], vision["vision_width"]),
            ("text", _text_heads(text_width), text_width),
        )
    ]
    if end_token != LARGEST:
        notes.append(f"texts are read at their end token {end_token}")
    config = ClipConfig(
        embed_dim=state["text_projection"].shape[1],
        text_width=text_width,
        text_layers=_count(state, "transformer.resblocks."),
        text_heads=_text_heads(text_width),
        text_hidden=_hidden(*state["transformer.resblocks.0.mlp.c_fc.weight"].shape),
        context_length=state["positional_embedding"].shape[0],
        vocab_size=vocab_size,
        end_token=None if end_token == LARGEST else end_token,
        **vision,
    )
    return config, notes


def _vision_of_shapes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    if "visual.layer1.0.conv1.weight" in state:
        width = state["visual.layer1.0.conv1.weight"].shape[0]
        return {
            "image_size": 32 * _side(state["visual.attnpool.positional_embedding"]),
            "patch_size": 32,
            "vision_width": width,
            "vision_layers": tuple(_count(state, f"visual.layer{i}.") for i in (1, 2, 3, 4)),
            "vision_heads": width * 32 // 64,
        }
    width, _, _, patch = state["visual.conv1.weight"].shape
    known = {c.vision_width: c.vision_heads for c in CONFIGS.values() if not c.is_resnet}
    return {
        "image_size": patch * _side(state["visual.positional_embedding"]),
        "patch_size": patch,
        "vision_width": width,
        "vision_layers": _count(state, "visual.transformer.resblocks."),
        "vision_heads": known.get(width) or _text_heads(width),
        "vision_hidden": _hidden(*state["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape),
    }


def _text_heads(width: int) -> int:
    if width % 64:
        raise ValueError(
            f"config: the number of heads cannot be guessed for a width of {width}; pass config="
        )
    return width // 64


def _hidden(hidden: int, width: int) -> int | None:
    """Of a feed-forward part; None where it has the usual size."""
    return None if hidden == 4 * width else hidden


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)})


def _side(positions: Tensor) -> int:
    side = math.isqrt(positions.shape[0] - 1)
    if side * side + 1 != positions.shape[0]:
        raise ValueError(
            f"state: expected 1 + a square number of image positions, got {positions.shape[0]}; "
            "only square images are supported"
        )
    return side


def config_of_mapping(described: Mapping[str, Any]) -> ClipConfig:
    """The configuration that open_clip (.json) or transformers (config.json) wrote.

    Raises:
        ValueError: it is neither, or describes something that this CLIP does not compute.
    """
    described = described.get("model_cfg", described)
    if "vision_cfg" in described:
        return _of_open_clip(described)
    if {"vision_config", "vision_config_dict"} & described.keys():
        return _of_transformers(described)
    raise ValueError(
        "config: expected a ClipConfig, open_clip's (with vision_cfg) or transformers' (with "
        f"vision_config), got the keys {sorted(described)}"
    )


def _of_transformers(described: Mapping[str, Any]) -> ClipConfig:
    kind = described.get("model_type", "clip")
    if kind not in TRANSFORMERS_TYPES:
        raise ValueError(
            f"config: expected model_type {' or '.join(TRANSFORMERS_TYPES)}, got {kind!r}, whose "
            "towers compute something else"
        )
    text, vision = (
        TRANSFORMERS_BOTH
        | defaults
        | (described.get(f"{side}_config") or {})
        | (described.get(f"{side}_config_dict") or {})
        for side, defaults in (("text", TRANSFORMERS_TEXT), ("vision", TRANSFORMERS_VISION))
    )
    for tower in (text, vision):
        _expect("layer_norm_eps", tower["layer_norm_eps"], 1e-5)
    _expect("num_channels", vision["num_channels"], 3)
    _expect("hidden_act of vision_config", vision["hidden_act"], text["hidden_act"])
    return ClipConfig(
        embed_dim=described.get("projection_dim", 512),
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        vision_width=vision["hidden_size"],
        vision_layers=vision["num_hidden_layers"],
        vision_heads=vision["num_attention_heads"],
        vision_hidden=_hidden(vision["intermediate_size"], vision["hidden_size"]),
        text_width=text["hidden_size"],
        text_layers=text["num_hidden_layers"],
        text_heads=text["num_attention_heads"],
        text_hidden=_hidden(text["intermediate_size"], text["hidden_size"]),
        context_length=text["max_position_embeddings"],
        vocab_size=text["vocab_size"],
        activation=text["hidden_act"],
        end_token=_end_token(text["eos_token_id"], text["vocab_size"], TRANSFORMERS_TYPES[kind]),
    )


def _end_token(eos: Any, vocab_size: int, two_is_largest: bool) -> int | None:
    if type(eos) is not int:
        raise ValueError(
            f"config: expected eos_token_id of text_config to be one id, where a text is read; "
            f"got {eos!r}"
        )
    # Early files say 2, which was never the end token: transformers then takes the largest id.
    return None if eos == vocab_size - 1 or (eos == 2 and two_is_largest) else eos


def _of_open_clip(described: Mapping[str, Any]) -> ClipConfig:
    vision = _open_clip_tower("vision_cfg", described, OPEN_CLIP_VISION)
    text = _open_clip_tower("text_cfg", described, OPEN_CLIP_TEXT)
    _check_open_clip("model_cfg", described)
    resnet = not isinstance(vision["layers"], int)
    channels = vision["width"] * (32 if resnet else 1)
    return ClipConfig(
        embed_dim=described["embed_dim"],
        image_size=vision["image_size"],
        patch_size=32 if resnet else vision["patch_size"],
        vision_width=vision["width"],
        vision_layers=tuple(vision["layers"]) if resnet else vision["layers"],
        vision_heads=channels // vision["head_width"],
        vision_hidden=None if resnet else _open_clip_hidden(vision),
        text_width=text["width"],
        text_layers=text["layers"],
        text_heads=text["heads"],
        text_hidden=_open_clip_hidden(text),
        context_length=text["context_length"],
        vocab_size=text["vocab_size"],
        activation="quick_gelu" if described.get("quick_gelu") else "gelu",
        end_token=text["eos_id"] if text["pool_type"] == "eos" else None,
    )


def _open_clip_hidden(tower: Mapping[str, Any]) -> int | None:
    return _hidden(int(tower["width"] * tower["mlp_ratio"]), tower["width"])


def _open_clip_tower(name: str, described: Mapping[str, Any], defaults: dict) -> dict[str, Any]:
    tower = described.get(name)
    if not isinstance(tower, Mapping):
        raise ValueError(f"config: expected {name} as a mapping, got {tower!r}")
    _check_open_clip(name, tower, defaults)
    return defaults | tower


def _check_open_clip(name: str, said: Mapping[str, Any], sizes: Iterable[str] = ()) -> None:
    same = OPEN_CLIP_SAME[name]
    for key, value in said.items():
        if key in same:
            known = value in same[key]
        else:  # what is left out, off or none is not there
            known = key in sizes or key in OPEN_CLIP_OTHER or value in (None, False)
        if not known:
            raise ValueError(
                f"config: {name} has {key}={value!r}, which this CLIP does not compute; the plain "
                "towers of OpenAI's architecture are supported"
            )


def _expect(name: str, got: Any, expected: Any) -> None:
    if got != expected:
        raise ValueError(f"config: expected {name} {expected!r}, got {got!r}")
