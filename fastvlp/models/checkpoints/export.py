"""A CLIP as open_clip and transformers load it: a folder of weights, sizes and image values."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from fastvlp.models.clip import Clip, ClipConfig

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
Target = Literal["open_clip", "transformers"]


def export_clip(
    model: Clip,
    folder: str | Path,
    to: Target,
    *,
    mean: Sequence[float] = OPENAI_MEAN,
    std: Sequence[float] = OPENAI_STD,
    eot_id: int | None = None,
    own_vocabulary: bool = False,
) -> None:
    """Write a model into a folder that another library loads, with equal features.

    open_clip takes it as ``create_model_and_transforms("local-dir:FOLDER")``, transformers as
    ``CLIPModel.from_pretrained(FOLDER)``. The tokenizer is written by
    `fastvlp.data.text.save_for_transformers`.

    Args:
        model: any `Clip`; transformers has no CLIP with a ResNet.
        folder: made if it is not there; files of these names in it are replaced.
        to: "open_clip" or "transformers".
        mean, std: that images were normalised by in training.
        eot_id: the end-of-text id, for a model that reads texts at their largest id; by default the
            last id of the vocabulary.
        own_vocabulary: whether the folder will hold a tokenizer that is not CLIP's own.

    Raises:
        ValueError: `to` is neither, or transformers has no such model.

    Examples:
        >>> import tempfile
        >>> from fastvlp.models import clip
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_clip(clip.create("tiny"), folder, "open_clip")
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['open_clip_config.json', 'open_clip_model.safetensors']
    """
    if to not in ("open_clip", "transformers"):
        raise ValueError(f"to: expected 'open_clip' or 'transformers', got {to!r}")
    folder, config = Path(folder), model.config
    if to == "transformers" and config.is_resnet:
        raise ValueError("to: expected open_clip, because transformers has no CLIP with a ResNet")
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    if to == "open_clip":
        values = {"mean": list(mean), "std": list(std), "interpolation": "bicubic"}
        sizes = open_clip_config(config, own_vocabulary)
        described = {"model_cfg": sizes, "preprocess_cfg": values}
        _write(folder / "open_clip_model.safetensors", state)
        _write_json(folder / "open_clip_config.json", described)
        return
    _write(folder / "model.safetensors", _to_transformers(state))
    _write_json(folder / "config.json", transformers_config(config, eot_id))
    _write_json(folder / "preprocessor_config.json", _image_processor(config, mean, std))


def open_clip_config(config: ClipConfig, own_vocabulary: bool = False) -> dict[str, Any]:
    """The sizes as open_clip's `model_cfg`, which `load_clip` reads back."""
    vision: dict[str, Any] = {
        "image_size": config.image_size,
        "layers": list(config.vision_layers) if config.is_resnet else config.vision_layers,
        "width": config.vision_width,
        "head_width": config.vision_width * (32 if config.is_resnet else 1) // config.vision_heads,
    }
    if not config.is_resnet:
        vision["patch_size"] = config.patch_size
        vision["mlp_ratio"] = _ratio(config.vision_hidden, config.vision_width)
    text: dict[str, Any] = {
        "context_length": config.context_length,
        "vocab_size": config.vocab_size,
        "width": config.text_width,
        "heads": config.text_heads,
        "layers": config.text_layers,
        "mlp_ratio": _ratio(config.text_hidden, config.text_width),
    }
    if config.end_token is not None:
        text |= {"pool_type": "eos", "eos_id": config.end_token}
    if own_vocabulary:
        # Any name: the tokenizer of a local folder is looked for in that folder.
        text["hf_tokenizer_name"] = "local"
    return {
        "embed_dim": config.embed_dim,
        "quick_gelu": config.activation == "quick_gelu",
        "vision_cfg": vision,
        "text_cfg": text,
    }


def _ratio(hidden: int | None, width: int) -> float:
    """Of the feed-forward part, from which open_clip computes its width, rounding down."""
    ratio = (hidden or 4 * width) / width
    return ratio if int(width * ratio) == (hidden or 4 * width) else (hidden + 0.5) / width


def transformers_config(config: ClipConfig, eot_id: int | None = None) -> dict[str, Any]:
    """The sizes as transformers' config.json of a CLIPModel, which `load_clip` reads back."""
    eos = config.end_token
    if eos is None:
        eos = config.vocab_size - 1 if eot_id is None else eot_id
    shared = {"hidden_act": config.activation, "projection_dim": config.embed_dim}
    text = {
        "model_type": "clip_text_model",
        "hidden_size": config.text_width,
        "intermediate_size": config.text_hidden or 4 * config.text_width,
        "num_hidden_layers": config.text_layers,
        "num_attention_heads": config.text_heads,
        "max_position_embeddings": config.context_length,
        "vocab_size": config.vocab_size,
        "eos_token_id": eos,
        "bos_token_id": None,
        "pad_token_id": 0,
    }
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": config.vision_width,
        "intermediate_size": config.vision_hidden or 4 * config.vision_width,
        "num_hidden_layers": config.vision_layers,
        "num_attention_heads": config.vision_heads,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.embed_dim,
        "text_config": text | shared,
        "vision_config": vision | shared,
    }


def _image_processor(
    config: ClipConfig, mean: Sequence[float], std: Sequence[float]
) -> dict[str, Any]:
    side = config.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
        "do_convert_rgb": True,
    }


# The names of tensors, from fastvlp's to transformers'.
_NAMES = [
    (r"^visual\.(?!proj$)", "vision_model."),
    (r"^(?!vision_model|visual\.proj$|text_projection$|logit_scale$)", "text_model."),
    (r"transformer\.resblocks\.", "encoder.layers."),
    (r"\.attn\.", ".self_attn."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.ln_pre\.", ".pre_layrnorm."),
    (r"\.ln_post\.", ".post_layernorm."),
    (r"\.ln_final\.", ".final_layer_norm."),
    (r"\.conv1\.", ".embeddings.patch_embedding."),
    (r"\.class_embedding$", ".embeddings.class_embedding"),
    (r"\.positional_embedding$", ".embeddings.position_embedding.weight"),
    (r"\.token_embedding\.", ".embeddings.token_embedding."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^text_projection$", "text_projection.weight"),
]


def _to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        renamed = name
        for old, new in _NAMES:
            renamed = re.sub(old, new, renamed)
        if ".in_proj_" in renamed:
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                out[renamed.replace("in_proj_", f"{part}_proj.")] = rows
        else:
            out[renamed] = value.T if name in ("visual.proj", "text_projection") else value
    return out


def _write(file: Path, state: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    # transformers asks for the metadata; memory that tensors share is refused.
    whole = {name: value.contiguous().clone() for name, value in state.items()}
    save_file(whole, file, metadata={"format": "pt"})


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
