"""Putting a state dict into a model, and saying what happened."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

# Names of a kind in an error; all of a large model would hide what matters.
MOST = 12


@dataclass(frozen=True)
class LoadReport:
    """What became of a checkpoint.

    Attributes:
        source: the format that was recognised, for example "OpenAI CLIP".
        loaded: how many of the model's tensors came from the checkpoint.
        missing: the model's tensors that did not and keep their values.
        unused: the checkpoint's tensors that the model has no place for.
        reshaped: for each resized tensor its name, its shape in the checkpoint, and the model's.
        notes: decisions that change results, for example which activation was chosen and why.
    """

    source: str
    loaded: int
    missing: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    reshaped: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.text()

    def text(self, most: int | None = None) -> str:
        """The report in lines, with at most so many names of a kind."""
        lines = [f"{self.source}: {self.loaded} tensors loaded"]
        for title, names in (("missing", self.missing), ("unused", self.unused)):
            lines += [f"  {title} ({len(names)}):", *_listed(names, most)] if names else []
        lines += [f"  reshaped: {name} {old} -> {new}" for name, old, new in self.reshaped]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def apply(
    model: nn.Module,
    state: dict[str, Tensor],
    *,
    source: str,
    strict: bool = True,
    may_miss: Iterable[str] = (),
    may_skip: Iterable[str] = (),
    heads: Iterable[str] = (),
    reshaped: Iterable[tuple[str, tuple[int, ...], tuple[int, ...]]] = (),
    notes: Iterable[str] = (),
) -> LoadReport:
    """Copies a renamed state dict into the model, all of it or nothing.

    Args:
        model: its tensors keep their dtype, device and storage.
        state: by the model's own names.
        source, reshaped, notes: for the report.
        strict: raise where a tensor is missing or unused, but for the exceptions that follow.
        may_miss: patterns (``fnmatch``) of the model's tensors that such checkpoints do not have.
        may_skip: patterns of theirs that the model does not want.
        heads: patterns of tensors, of either, without which all the others compute the same: task
            heads and what only training needs. Where no others stand in the way, the error
            proposes strict=False.

    Raises:
        ValueError: with the report, when strict; or shapes differ, always. The model is as it was.
    """
    own = model.state_dict()
    missing = tuple(sorted(own.keys() - state.keys()))
    unused = tuple(sorted(state.keys() - own.keys()))
    shared = [name for name in own if name in state]
    report = LoadReport(source, len(shared), missing, unused, tuple(reshaped), tuple(notes))
    wrong = [
        f"{n}: checkpoint {tuple(state[n].shape)}, model {tuple(own[n].shape)}"
        for n in shared
        if state[n].shape != own[n].shape
    ]
    if wrong:
        listed = "\n".join(_listed(wrong, MOST))
        raise ValueError(f"state: shapes differ\n{listed}\n{report.text(MOST)}")
    odd = _unmatched(missing, may_miss) + _unmatched(unused, may_skip)
    if strict and odd:
        raise ValueError(
            f"state: the checkpoint does not fit the model: {_why(odd, heads)}\n{report.text(MOST)}"
        )
    with torch.no_grad():
        for name in shared:
            own[name].copy_(state[name])
    return report


def _listed(names: Sequence[str], most: int | None) -> list[str]:
    left = len(names[most:]) if most else 0
    return [f"    {n}" for n in names[:most]] + [f"    and {left} more"] * bool(left)


def _why(odd: list[str], heads: Iterable[str]) -> str:
    decisive = _unmatched(odd, heads)
    if not decisive:
        return f"only {', '.join(odd[:4])} and the like differ; strict=False loads all the rest"
    return (
        f"without {decisive[0]} on both sides the model computes something else than was trained; "
        "it is a checkpoint of another architecture, or not all of one"
    )


def _unmatched(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    patterns = tuple(patterns)
    return [n for n in names if not any(fnmatchcase(n, p) for p in patterns)]
