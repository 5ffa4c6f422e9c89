"""Which implementation of an operator runs, and why not the others."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

BACKENDS = ("native", "triton", "reference")

# Per operator, in order of preference: a backend's name and a function of the operator's own
# arguments that lists the reasons why it cannot run (empty: it can).
_CANDIDATES: dict[str, dict[str, Callable[..., list[str]]]] = {}
# Per operator: the environment variable that forces one of its backends.
_VARIABLES: dict[str, str] = {}


def register(
    op: str, *, variable: str = "FASTVLP_BACKEND", **candidates: Callable[..., list[str]]
) -> None:
    """Declares the backends of `op`, the preferred one first.

    `variable` is the environment variable that forces one; FASTVLP_BACKEND knows BACKENDS, any
    other one the candidates' names.
    """
    _CANDIDATES[op] = candidates
    _VARIABLES[op] = variable


def operators() -> list[str]:
    """Names of all registered operators."""
    return sorted(_CANDIDATES)


@dataclass(frozen=True)
class Explanation:
    """What `explain` found: the backend that runs, and for each other one the reasons why not."""

    op: str
    chosen: str | None
    reasons: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.op}: runs {self.chosen or 'nowhere'}"]
        for name, why in self.reasons.items():
            lines += [f"  not {name}: {reason}" for reason in why]
        return "\n".join(lines)


def explain(op: str, *args, **kwargs) -> Explanation:
    """Says which implementation `fastvlp.ops.<op>(*args, **kwargs)` would run and why no other.

    Honours the environment variable FASTVLP_BACKEND (native, triton or reference), for attention
    FASTVLP_ATTENTION. Raises ValueError for an unknown operator or an unknown forced backend.
    """
    if op not in _CANDIDATES:
        raise ValueError(f"op: expected one of {', '.join(operators())}; got {op!r}")
    variable = _VARIABLES[op]
    forced = forced_backend(op)
    chosen, reasons = None, {}
    for name, why_not in _CANDIDATES[op].items():
        why = why_not(*args, **kwargs)
        if not why and forced not in (None, name):
            why = [f"{variable}={forced} asks for another"]
        if not why and chosen is not None:
            why = [f"{chosen} is preferred"]
        if why:
            reasons[name] = why
        else:
            chosen = name
    if forced is not None and forced not in _CANDIDATES[op]:
        reasons[forced] = [f"{op} has no such implementation"]
    return Explanation(op, chosen, reasons)


def choose(op: str, *args, **kwargs) -> str:
    """The backend to run. Raises RuntimeError where none can, above all a forced one."""
    explanation = explain(op, *args, **kwargs)
    if explanation.chosen is None:
        raise RuntimeError(f"no implementation can run; {explanation}")
    return explanation.chosen


@torch.compiler.assume_constant_result
def forced_backend(op: str) -> str | None:
    """The backend that the operator's environment variable asks for, if any."""
    variable = _VARIABLES[op]
    known = BACKENDS if variable == "FASTVLP_BACKEND" else tuple(_CANDIDATES[op])
    forced = os.environ.get(variable) or None
    if forced not in (None, *known):
        raise ValueError(f"{variable}: expected one of {', '.join(known)}; got {forced!r}")
    return forced
