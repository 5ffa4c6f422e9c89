"""Weights for ALBEF's fine-tuned models: from pretraining, and from the authors' fine-tuned files.

Retrieval has the parameters of pretraining: `albef.load_albef` serves it. The names of the others
are the authors', who leave out `bert.` in the encoder of text and write `_m` behind the momentum
encoder's.
"""

from __future__ import annotations

import re

from torch import Tensor

from fastvlp.models.albef import Albef
from fastvlp.models.albef.tasks.classification import AlbefClassifier, AlbefTextAssignment
from fastvlp.models.albef.tasks.vqa import AlbefVqa

from ._report import LoadReport, apply
from .albef import (
    HEAD,
    REPEATED,
    Source,
    adds_token_types,
    modern,
    read_source,
    resize,
    settle_token_types,
    tie,
)

Finetuned = AlbefVqa | AlbefClassifier | AlbefTextAssignment
PARTS = ("visual_encoder", "text_encoder", "text_decoder", "cls_head", "ta_head")
HEADS = ["cls_head.*", "ta_head.*"]
# What pretraining alone trains.
PRETRAINING = [
    "vision_proj.*", "text_proj.*", "itm_head.*", "temp", "*_queue", "queue_ptr", f"*{HEAD}*",
]  # fmt: skip
LAYER = re.compile(r"(text_encoder\.bert\.encoder\.layer\.)(\d+)\.(.*)")


def start_from(
    model: Finetuned, pretrained: Albef | AlbefTextAssignment, *, strict: bool = True
) -> LoadReport:
    """The weights with which fine-tuning starts.

    Image positions are resized bicubic. Where the model has each fusion layer twice both take the
    pretrained one. An answer decoder takes the embeddings, the fusion layers and the vocabulary
    head. Classes keep fresh values. The momentum encoder takes the model's weights.

    Raises:
        ValueError: the two do not fit; the model is as it was.
    """
    source, reshaped, notes = pretrained.student.state_dict(), [], []
    own = model.student.state_dict()
    state = _twice(source, pretrained.config.text_layers) if _doubles(own, source) else dict(source)
    may_miss = list(HEADS)
    if isinstance(model, AlbefVqa):
        state |= _decoder(source, model)
        if model.config.vision_width != model.config.text_width:
            may_miss.append("text_decoder.*.crossattention.self.*")
            notes.append("the decoder's keys and values keep fresh values: images differ in width")
    resize(state, "visual_encoder.", model.student.visual_encoder, reshaped)
    report = apply(
        model.student, state, source="pretrained ALBEF", strict=strict, may_miss=may_miss,
        may_skip=PRETRAINING + HEADS, reshaped=reshaped, notes=notes,
    )  # fmt: skip
    if isinstance(model, AlbefTextAssignment) and isinstance(pretrained, Albef):
        model.vision_proj.load_state_dict(pretrained.student.vision_proj.state_dict())
    model.reset_momentum()
    return report


def load_finetuned(
    model: Finetuned, source: Source, *, strict: bool = True, token_types: bool | None = None
) -> LoadReport:
    """The authors' or LAVIS' fine-tuned checkpoint of the same task.

    Image positions are resized bicubic. A momentum encoder that the checkpoint does not have takes
    the model's weights. `strict` is `apply`'s, `token_types` is `albef.load_albef`'s.

    Raises:
        ValueError: the checkpoint does not fit; the model is as it was.
    """
    given, lavis = read_source(source)
    state, notes, reshaped, may_miss, may_skip = {}, [], [], [], ["temp"]
    for name, value in given.items():
        if not name.endswith(REPEATED):
            state[_own_name(name)] = value
    if not isinstance(model, AlbefTextAssignment):
        may_skip += ["vision_proj.*", "text_proj.*"]
    else:
        may_skip.append("text_proj.*")
    has_momentum = any(name.startswith("momentum.") for name in state)
    if model.momentum is None:
        may_skip.append("momentum.*")
    else:
        may_miss.append("momentum._extra_state" if has_momentum else "momentum.*")
    settle_token_types(state, model, adds_token_types(token_types, given, lavis), notes)
    for prefix in ("student.", "momentum.module."):
        tie(state, f"{prefix}text_decoder.")
        resize(state, f"{prefix}visual_encoder.", model.student.visual_encoder, reshaped)
    report = apply(
        model, state, source="fine-tuned ALBEF", strict=strict, may_miss=may_miss,
        may_skip=may_skip, heads=[f"*{head}" for head in HEADS], reshaped=reshaped, notes=notes,
    )  # fmt: skip
    if model.momentum is not None:
        model.refresh_copy() if has_momentum else model.reset_momentum()
    return report


def _own_name(name: str) -> str:
    part, _, rest = name.partition(".")
    if part.removesuffix("_m") not in PARTS:
        return name
    place = "momentum.module" if part.endswith("_m") else "student"
    part = part.removesuffix("_m")
    if part == "text_encoder" and not rest.startswith("bert."):
        rest = f"bert.{rest}"
    return f"{place}.{part}.{modern(rest)}"


def _layers(state: dict[str, Tensor]) -> int:
    return 1 + max(int(found[2]) for found in map(LAYER.fullmatch, state) if found)


def _doubles(own: dict[str, Tensor], source: dict[str, Tensor]) -> bool:
    return _layers(own) > _layers(source)


def _twice(source: dict[str, Tensor], text_layers: int) -> dict[str, Tensor]:
    """Each fusion layer under the numbers of its two copies."""
    state = {}
    for name, value in source.items():
        found = LAYER.fullmatch(name)
        if not found or int(found[2]) < text_layers:
            state[name] = value
            continue
        first = text_layers + 2 * (int(found[2]) - text_layers)
        for number in (first, first + 1):
            state[f"{found[1]}{number}.{found[3]}"] = value
    return state


def _decoder(source: dict[str, Tensor], model: AlbefVqa) -> dict[str, Tensor]:
    """The decoder's tensors that the pretrained encoder of text has, where shapes agree."""
    state, own = {}, model.student.state_dict()
    for name, value in source.items():
        if not name.startswith("text_encoder."):
            continue
        found = LAYER.fullmatch(name)
        if found:
            number = int(found[2]) - model.config.text_layers
            name = f"{found[1]}{number}.{found[3]}" if number >= 0 else ""
        name = name.replace("text_encoder.", "text_decoder.", 1)
        if name in own and own[name].shape == value.shape:
            state[name] = value
    return state
