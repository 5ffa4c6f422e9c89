"""Checkpoints for `fastvlp.models.albef`: the authors', LAVIS', timm's ViT and DeiT, and BERT.

The authors' names and LAVIS' are the same: `visual_encoder.*`, `text_encoder.bert.*`,
`text_encoder.cls.predictions.*`, `vision_proj`, `text_proj`, `temp`, `itm_head`, the momentum
encoder's with `_m`, `image_queue`, `text_queue` [embed_dim, size] and `queue_ptr`; fine-tuned
models lack `bert.` and the vocabulary head. LAVIS leaves the momentum encoder out when it saves,
and its text encoder adds no token types, which in this model are zeros then.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastvlp.models.albef import Albef, AlbefConfig
from fastvlp.models.files import read_json

from ._files import read_checkpoint, unwrap
from ._positions import resize_grid_positions
from ._report import LoadReport, apply
from ._vit import CLASSIFIERS, plain_vit

Source = str | Path | dict[str, Tensor]
TOWERS = ("visual_encoder", "text_encoder", "vision_proj", "text_proj")
QUEUES = ("image_queue", "text_queue", "queue_ptr", "idx_queue")
HEAD = "text_encoder.cls.predictions."
WORDS = "bert.embeddings.word_embeddings.weight"
TYPES = "bert.embeddings.token_type_embeddings.weight"
# What a BERT's configuration says where its layers compute as these do.
BERT = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "position_embedding_type": "absolute",
}
# The parts of the configuration that LAVIS saves beside its weights.
LAVIS_CONFIG = {"run", "model", "datasets"}
# A copy of another tensor, or a constant.
REPEATED = ("position_ids", "cls.predictions.decoder.bias")


def load_albef(
    model: Albef, source: Source, *, strict: bool = True, token_types: bool | None = None
) -> LoadReport:
    """The authors' or LAVIS' checkpoint, of pretraining or of retrieval, into the whole model.

    Image positions are resized as the authors do, bicubic, for the model and its momentum encoder.
    A momentum encoder that the checkpoint does not have takes the model's weights. Queues of
    another size stay as they are. `strict` is `apply`'s.

    Args:
        token_types: whether the checkpoint's code adds the token types to the words. The authors'
            does, LAVIS' does not, even if a file has them. None: as the file tells, False if it has
            none or if LAVIS saved it (its configuration lies beside the weights), else True.

    Raises:
        ValueError: the checkpoint does not fit; the model is as it was.
    """
    given, lavis = read_source(source)
    state, notes, reshaped = {}, [], []
    for name, value in given.items():
        if name in QUEUES or name.endswith(REPEATED):
            continue
        state[_own_name(name)] = value
    has_momentum = any(name.startswith("momentum.") for name in state)
    may_miss, may_skip = ["momentum._extra_state", "queue.*"], []
    if model.momentum is None:
        may_skip.append("momentum.*")
    elif not has_momentum:
        may_miss.append("momentum.*")
        notes.append("no momentum encoder in the checkpoint: it takes the model's weights")
    if not any(HEAD in name for name in state):
        may_miss.append(f"*{HEAD}*")
        notes.append("no vocabulary head in the checkpoint: it keeps its values")
    if model.queue is not None:
        state |= _queues(model, given, notes)
    settle_token_types(state, model, adds_token_types(token_types, given, lavis), notes)
    for prefix in ("student.", "momentum.module."):
        tie(state, f"{prefix}text_encoder.")
        resize(state, f"{prefix}visual_encoder.", model.student.visual_encoder, reshaped)
    report = apply(
        model, state, source="ALBEF", strict=strict, may_miss=may_miss, may_skip=may_skip,
        heads=["itm_head.*", "queue.*", "momentum.*", f"*{HEAD}*"], reshaped=reshaped, notes=notes,
    )  # fmt: skip
    if model.momentum is not None:
        model.refresh_copy() if has_momentum else model.reset_momentum()
    return report


def config_of_shapes(state: Mapping[str, Tensor], **overrides: Any) -> AlbefConfig:
    """The sizes of the authors' or LAVIS' checkpoint, heads being of 64, as in all published ones.

    Without a momentum encoder and queues unless `overrides`, fields of ``AlbefConfig``, say
    pretraining=True.

    Raises:
        ValueError: a weight that tells a size is not there.
    """
    shapes = {
        _own_name(name).removeprefix("student."): value.shape for name, value in state.items()
    }
    try:
        side = math.isqrt(shapes["visual_encoder.pos_embed"][1] - 1)
        width, _, patch, _ = shapes["visual_encoder.patch_embed.proj.weight"]
        words, text_width = shapes[f"text_encoder.{WORDS}"]
        positions = shapes["text_encoder.bert.embeddings.position_embeddings.weight"][0]
        embed_dim = shapes["vision_proj.weight"][0]
    except KeyError as error:
        raise ValueError(f"state: expected the weights of an ALBEF, found no {error}") from None
    layers = _numbers(shapes, r"text_encoder\.bert\.encoder\.layer\.(\d+)\.")
    fusion = _numbers(shapes, r"text_encoder\.bert\.encoder\.layer\.(\d+)\.crossattention\.")
    if not 0 < fusion < layers:
        raise ValueError(
            f"state: expected cross-attention in the upper layers of text alone, as ALBEF has it; "
            f"got it in {fusion} of {layers}, where BLIP has it in all"
        )
    found: dict[str, Any] = {
        "image_size": side * patch,
        "patch_size": patch,
        "vision_width": width,
        "vision_layers": _numbers(shapes, r"visual_encoder\.blocks\.(\d+)\."),
        "vision_heads": max(1, width // 64),
        "text_width": text_width,
        "text_heads": max(1, text_width // 64),
        "text_layers": layers - fusion,
        "fusion_layers": fusion,
        "vocab_size": words,
        "text_positions": positions,
        "embed_dim": embed_dim,
        "pretraining": False,
    }
    return AlbefConfig(**found | overrides)


def _numbers(names, pattern: str) -> int:
    return len({found[1] for found in (re.match(pattern, name) for name in names) if found})


def load_vit(model: Albef, source: Source, *, strict: bool = True) -> LoadReport:
    """timm's ViT or DeiT into the image transformer.

    The classifier is left out, and so are a distilled DeiT's second token and its position;
    positions are resized bicubic. The momentum encoder takes the model's weights.

    Raises:
        ValueError: it is no plain ViT, or does not fit; the model is as it was.
    """
    tower = model.student.visual_encoder
    reshaped, notes = [], []
    state = plain_vit(_state(source), notes)
    resize(state, "", tower, reshaped)
    report = apply(
        tower, state, source="timm ViT", strict=strict, may_skip=CLASSIFIERS, reshaped=reshaped,
        notes=notes,
    )  # fmt: skip
    if model.momentum is not None:
        model.reset_momentum()
    return report


def load_bert(model: Albef, source: Source, *, strict: bool = True) -> LoadReport:
    """transformers' BertModel, BertForMaskedLM or BertForPreTraining into text and fusion layers.

    Layers take their place in order. Cross-attention, which BERT does not have, keeps its fresh
    values and is reported missing. The momentum encoder takes the model's weights.

    Raises:
        ValueError: the weights do not fit, or config.json beside them describes a BERT that
            computes something else; the model is as it was.
    """
    if not isinstance(source, dict):
        _check_bert(Path(source), model.config)
    state = {}
    for name, value in _state(source).items():
        if not name.startswith(("bert.", "cls.")):
            name = f"bert.{name}"
        if not name.endswith(REPEATED):
            state[modern(name)] = value
    may_miss = ["*.crossattention.*"]
    notes = ["cross-attention keeps its fresh values: BERT has none"]
    if not any(name.startswith("cls.predictions.") for name in state):
        may_miss.append("cls.predictions.*")
        notes.append("no vocabulary head in the checkpoint: it keeps its values")
    tie(state, "")
    report = apply(
        model.student.text_encoder, state, source="BERT", strict=strict, may_miss=may_miss,
        may_skip=["bert.pooler.*", "cls.seq_relationship.*"], heads=["cls.*"], notes=notes,
    )  # fmt: skip
    if model.momentum is not None:
        model.reset_momentum()
    return report


def _check_bert(path: Path, config: AlbefConfig) -> None:
    file = path / "config.json" if path.is_dir() else path.with_name("config.json")
    if not file.is_file():
        return
    described = read_json(file)
    for name, expected in (BERT | {"num_attention_heads": config.text_heads}).items():
        if described.get(name, expected) != expected:
            raise ValueError(
                f"source: expected {name} {expected!r} in {file}, got {described[name]!r}, with "
                "which these layers would compute something else"
            )


def _state(source: Source) -> dict[str, Tensor]:
    return read_source(source)[0]


def read_source(source: Source) -> tuple[dict[str, Tensor], bool]:
    """The state dict, and whether LAVIS saved it."""
    loaded = source if isinstance(source, dict) else read_checkpoint(source)
    config = loaded.get("config")
    lavis = isinstance(config, dict) and LAVIS_CONFIG <= config.keys()
    return unwrap(loaded, "state" if loaded is source else source), lavis


def adds_token_types(said: bool | None, given: dict[str, Tensor], lavis: bool) -> bool:
    has = any(name.endswith(TYPES.partition(".")[2]) for name in given)
    return (has and not lavis) if said is None else said


def settle_token_types(
    state: dict[str, Tensor], model: nn.Module, added: bool, notes: list[str]
) -> None:
    """Zeros for the token types of each text tower in a state by own names, or a word on them."""
    if added:
        notes.append("token types are added to the words, as by the authors, unlike LAVIS")
        return
    notes.append("no token types, as in LAVIS: they are zeros here")
    for name, own in model.state_dict().items():
        if name.endswith(TYPES) and name.replace(TYPES, WORDS) in state:
            state[name] = torch.zeros_like(own)


def _own_name(name: str) -> str:
    """The model's own name of an authors' tensor."""
    tower, _, rest = name.partition(".")
    if tower.removesuffix("_m") not in TOWERS:
        return name
    place = "momentum.module" if tower.endswith("_m") else "student"
    tower = tower.removesuffix("_m")
    if tower == "text_encoder":
        rest = rest if rest.startswith(("bert.", "cls.")) else f"bert.{rest}"
        rest = modern(rest)
    return f"{place}.{tower}.{rest}"


def modern(name: str) -> str:
    """Layer norm's old names, of BERT's first release."""
    return re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name).replace(
        "LayerNorm.beta", "LayerNorm.bias"
    )


def tie(state: dict[str, Tensor], prefix: str) -> None:
    """The vocabulary's matrix under both of its names."""
    words = state.get(f"{prefix}{WORDS}")
    if words is None:
        return
    decoder = state.setdefault(f"{prefix}cls.predictions.decoder.weight", words)
    if decoder.shape == words.shape and not torch.equal(decoder, words):
        raise ValueError(
            f"state: {prefix}{WORDS} and {prefix}cls.predictions.decoder.weight differ, where this "
            "model has one matrix; delete one of them from the state dict"
        )


def resize(state: dict[str, Tensor], prefix: str, tower: nn.Module, reshaped: list) -> None:
    name = f"{prefix}pos_embed"
    if name not in state:
        return
    patch = tower.patch_embed.proj.kernel_size[0]
    side = tower.image_size // patch
    old = state[name]
    state[name] = resize_grid_positions(old, (side, side), antialias=False)
    if state[name].shape != old.shape:
        reshaped.append((name, tuple(old.shape), tuple(state[name].shape)))


def _queues(model: Albef, given: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """The queues by this model's names, rows of one pair; none where they do not fit."""
    if "image_queue" not in given:
        notes.append("no queues in the checkpoint: they stay as they are")
        return {}
    size = given["image_queue"].shape[1]
    if size != model.queue.size:
        notes.append(f"queues of {size} pairs for {model.queue.size}: they stay as they are")
        return {}
    found = {f"queue.{name}": given[name].T for name in ("image_queue", "text_queue")}
    found["queue.queue_length"] = torch.tensor(size)
    found["queue.position"] = given["queue_ptr"].reshape(())
    if "idx_queue" in given and model.queue.queue_ids is not None:
        found["queue.queue_ids"] = given["idx_queue"].reshape(-1)
    return found
