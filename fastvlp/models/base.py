"""What the models share: the switch between kernels and plain PyTorch, and saving and loading."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from fastvlp.models.files import read_json, read_safetensors
from fastvlp.nn import Dropout, Linear

# The model of each kind; the package imports all of its own.
_MODELS: dict[str, type[Model]] = {}


class ReferenceMixin(nn.Module):
    """A module with two forms of one computation: the kernels', and plain PyTorch's."""

    reference = False


class Model(ReferenceMixin):
    """A model made from a frozen dataclass of its sizes.

    A subclass that sets `kind`, its name in saved files, and `config_type`, and is made from its
    configuration alone, can be saved and loaded once it is defined.
    """

    kind: ClassVar[str]
    config_type: ClassVar[type]

    def __init_subclass__(cls, **options) -> None:
        super().__init_subclass__(**options)
        if "kind" not in vars(cls):  # shared by several models, or a variant of one
            return
        taken = _MODELS.setdefault(cls.kind, cls)
        if taken.__qualname__ != cls.__qualname__:
            raise TypeError(
                f"kind: expected a name of its own for {cls.__qualname__}, got {cls.kind!r}, which "
                f"is that of {taken.__qualname__}"
            )
        _MODELS[cls.kind] = cls  # the present one, where a module is loaded again

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    @property
    def system(self) -> str:
        """The system that the kind belongs to: "albef" for "albef-retrieval"."""
        return self.kind.partition("-")[0]

    def use_reference(self, reference: bool = True) -> Model:
        """Compute with plain PyTorch and padded tensors from now on, or with the kernels again.

        The weights, and up to rounding the results, are the same.
        """
        for module in self.modules():
            if isinstance(module, ReferenceMixin | Dropout | Linear):
                module.reference = reference
        return self


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """`fastvlp.nn.attention` by PyTorch alone, [batch, length, heads, head_dim].

    Every row must attend to a key.
    """
    allowed = None if key_mask is None else key_mask[:, None, None]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if causal and allowed is not None:
        allowed, causal = allowed & allowed.new_ones(q.shape[2], k.shape[2]).tril(), False
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=causal)
    return out.transpose(1, 2)


def mean_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Of logits [n, classes] and labels [n] or their probabilities [n, classes].

    0 where n is 0, with zero gradients.
    """
    return F.cross_entropy(logits, labels, reduction="sum") / max(len(labels), 1)


def save(model: Model, path: str | Path) -> None:
    """Write ``path``.safetensors (weights) and ``path``.json (kind and configuration).

    Each file is complete or absent: it is written beside its place and then moved there.
    """
    from safetensors.torch import save_file

    weights, config = _files(path)
    weights.parent.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    Path(f"{config}.part").write_text(json.dumps(description(model), indent=2) + "\n")
    save_file(_without_ties(state), f"{weights}.part")
    # save_file makes a file for its owner alone; all are to have the mode that new files have.
    os.chmod(f"{weights}.part", os.stat(f"{config}.part").st_mode)
    for file in (weights, config):
        os.replace(f"{file}.part", file)


def load(path: str | Path, kind: str | None = None) -> Model:
    """The model that ``save(model, path)`` wrote, on the CPU, in evaluation mode.

    Raises:
        FileNotFoundError: one of the two files is not there.
        ValueError: the files are damaged, do not fit one another, or hold no known kind of model
            or another one than ``kind``.
    """
    weights, config = _files(path)
    described = read_json(config)
    found = described.get("kind", "clip")
    if found not in _MODELS or kind not in (None, found):
        raise ValueError(f"path: expected {kind or kinds()} in {config}, got {found!r}")
    try:
        model = from_description(described)
        model.load_state_dict(_with_ties(read_safetensors(weights), model))
    except (RuntimeError, TypeError) as error:  # of a field, or of tensors, that it does not have
        raise ValueError(
            f"path: {weights} does not fit {config.name}, which another version of fastvlp may "
            f"have written: {str(error)[:400]}"
        ) from error
    return model.eval()


def description(model: Model) -> dict:
    """Kind and configuration, as JSON has them."""
    return {"kind": model.kind} | dataclasses.asdict(model.config)


def from_description(described: dict) -> Model:
    """A model of this kind and configuration, with weights of its own."""
    sizes = dict(described)
    model = _MODELS[sizes.pop("kind", "clip")]
    return model(model.config_type(**_tuples(sizes)))


def unknown_name(
    argument: str, name: str, known: Sequence[str], shown: Sequence[str] | None = None
) -> ValueError:
    """The error for a name that is none of the known ones; it suggests the nearest.

    Args:
        argument: what was named.
        name: what came.
        known: all names that are accepted.
        shown: those to list, by default all.

    Examples:
        >>> str(unknown_name("model", "tinny", ["tiny", "base"]))
        "model: expected one of base, tiny, got 'tinny'; did you mean 'tiny'?"
    """
    folded = {each.lower(): each for each in reversed(known)}
    near = difflib.get_close_matches(str(name).lower(), folded, 1)
    hint = f"; did you mean {folded[near[0]]!r}?" if near else ""
    listed = ", ".join(sorted(known if shown is None else shown))
    return ValueError(f"{argument}: expected one of {listed}, got {name!r}{hint}")


def kinds() -> list[str]:
    """The kinds of models that can be loaded."""
    return sorted(_MODELS)


def _tuples(described: dict) -> dict:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in described.items()}


def _without_ties(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tied tensors once, under the first of their names: the file format refuses shared memory."""
    kept, seen = {}, set()
    for name, value in state.items():
        place = (value.data_ptr(), value.shape)
        if value.numel() and place in seen:
            continue
        seen.add(place)
        kept[name] = value
    return kept


def _with_ties(state: dict[str, Tensor], model: Model) -> dict[str, Tensor]:
    first: dict[tuple, str] = {}
    full = dict(state)
    for name, value in model.state_dict().items():
        source = first.setdefault((value.data_ptr(), value.shape), name)
        if name not in state and value.numel() and source in state:
            full[name] = state[source]
    return full


def _files(path: str | Path) -> tuple[Path, Path]:
    return Path(f"{path}.safetensors"), Path(f"{path}.json")
