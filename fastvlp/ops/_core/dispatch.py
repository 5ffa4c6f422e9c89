"""Which implementation of an operator runs, and why not the others."""

import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..._tracing import constant_result
from .. import compiled

BACKENDS = ("native", "triton", "reference")

Shape = tuple[int, ...]


@dataclass(frozen=True)
class _Operator:
    # In order of preference: a backend's name and a function of the operator's own arguments that
    # lists the reasons why it cannot run (empty: it can).
    candidates: dict[str, Callable[..., list[str]]]
    variable: str  # of the environment, which forces one
    example: dict[str, Shape | list[Shape]]
    # Of the same arguments: the backend that comes first for these, or None for the usual order.
    first: Callable[..., str | None] | None


_OPERATORS: dict[str, _Operator] = {}
_WARNED: set[str] = set()


def register_backends(
    op: str,
    *,
    example: dict[str, Shape | list[Shape]],
    variable: str = "FASTVLP_BACKEND",
    first: Callable[..., str | None] | None = None,
    **candidates: Callable[..., list[str]],
) -> None:
    """Declares the backends of `op`, the preferred one first.

    `example` has the arguments that the candidates look at, the operator's first ones, with shapes
    for tensors that serve as an example. `variable` is the environment variable that forces a
    backend; FASTVLP_BACKEND knows BACKENDS, any other one the candidates' names. `first` names the
    backend that is preferred for some arguments instead, or returns None.
    """
    _OPERATORS[op] = _Operator(candidates, variable, example, first)


def operators() -> list[str]:
    """Names of all registered operators."""
    return sorted(_OPERATORS)


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


def explain(op: str, *args: Any, **kwargs: Any) -> Explanation:
    """Says which implementation `fastvlp.ops.<op>(*args, **kwargs)` would run and why no other.

        print(explain("contrastive"))  # of small float32 tensors on a GPU if there is one
        print(explain("contrastive", image_features, text_features))

    Honours the environment variable FASTVLP_BACKEND (native, triton or reference), for attention
    FASTVLP_ATTENTION, and FASTVLP_CPU_ISA.

    Raises:
        ValueError: for an unknown operator or an unknown forced backend.
        TypeError: for arguments that are not the operator's.

    Examples:
        >>> import torch
        >>> from fastvlp.ops import explain
        >>> x = torch.randn(8, 16, dtype=torch.float64)
        >>> explain("contrastive", x, x).chosen
        'reference'
    """
    if op not in _OPERATORS:
        raise ValueError(f"op: expected one of {', '.join(operators())}; got {op!r}")
    if not args and not kwargs:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        args = tuple(_zeros(shape, device) for shape in _OPERATORS[op].example.values())
    else:
        _check_arguments(op, args, kwargs)
        # The candidates name the arguments in words of their own.
        names = list(_OPERATORS[op].example)[len(args) :]
        args = (*args, *(kwargs.pop(name) for name in names))
    return _explain(op, *args, **kwargs)


def choose(op: str, *args: Any, **kwargs: Any) -> str:
    """The backend to run. Raises RuntimeError where none can, above all a forced one.

    Warns once in a process where plain PyTorch runs for want of compiled kernels.
    """
    if (name := _undisputed(op, args, kwargs)) is not None:
        return name
    explanation = _explain(op, *args, **kwargs)
    if explanation.chosen is None:
        raise RuntimeError(f"no implementation can run; {explanation}")
    if explanation.chosen == "reference" and forced_backend(op) is None:
        unbuilt = compiled.load()
        if unbuilt and explanation.reasons.get("native") == list(unbuilt):
            _warn_of_unbuilt_kernels(op, *unbuilt)
    return explanation.chosen


def _undisputed(op: str, args: tuple, kwargs: dict) -> str | None:
    """The backend to run where nothing is to be said about it: the first that can, if it is not
    the reference and none is forced. Asks no other for its reasons."""
    if forced_backend(op) is not None or _instruction_set_fault(args, kwargs) is not None:
        return None
    known = _OPERATORS[op]
    first = None if known.first is None else known.first(*args, **kwargs)
    if first is not None and not known.candidates[first](*args, **kwargs):
        return None if first == "reference" else first
    for name, why_not in known.candidates.items():
        if not why_not(*args, **kwargs):
            return None if name == "reference" else name
    return None


def _candidates(op: str, args: tuple, kwargs: dict) -> dict[str, Callable[..., list[str]]]:
    """The operator's backends in order of preference for these arguments."""
    known = _OPERATORS[op]
    if known.first is not None and (name := known.first(*args, **kwargs)):
        return {name: known.candidates[name], **known.candidates}
    return known.candidates


def _instruction_set_fault(args: tuple, kwargs: dict) -> str | None:
    """Why nothing runs on the CPU: what was asked for cannot be had."""
    fault = compiled.instruction_set_fault()
    return fault if fault and _device((*args, *kwargs.values())) == "cpu" else None


@constant_result
def _warn_of_unbuilt_kernels(op: str, reason: str) -> None:
    if reason not in _WARNED:
        _WARNED.add(reason)
        warnings.warn(
            f"{op} runs in plain PyTorch, slower and with more memory than it needs: {reason}",
            RuntimeWarning,
            stacklevel=4,
        )


def _explain(op: str, *args, **kwargs) -> Explanation:
    variable, candidates = _OPERATORS[op].variable, _candidates(op, args, kwargs)
    forced = forced_backend(op)
    chosen, reasons = None, {}
    if (fault := _instruction_set_fault(args, kwargs)) is not None:
        # Nothing runs in the place of what was asked for, as with a forced backend.
        return Explanation(op, None, {name: [fault] for name in candidates})
    for name, why_not in candidates.items():
        why = why_not(*args, **kwargs)
        if not why and forced not in (None, name):
            why = [f"{variable}={forced} asks for another"]
        if not why and chosen is not None:
            why = [f"{chosen} is preferred"]
        if why:
            reasons[name] = why
        else:
            chosen = name
    # In the order in which they were declared, whichever was asked first.
    reasons = {name: reasons[name] for name in _OPERATORS[op].candidates if name in reasons}
    if forced is not None and forced not in candidates:
        reasons[forced] = [f"{op} has no such implementation"]
    return Explanation(op, chosen, reasons)


def _zeros(shape: Shape | list[Shape], device: str):
    if isinstance(shape, list):
        return [torch.zeros(each, device=device) for each in shape]
    return torch.zeros(shape, device=device)


def _check_arguments(op: str, args: tuple, kwargs: dict) -> None:
    example = _OPERATORS[op].example
    given = {**dict(zip(example, args, strict=False)), **kwargs}
    for name, shape in example.items():
        lists = isinstance(shape, list)
        if name not in given:
            raise TypeError(
                f"{name}: expected the arguments of {op}, at least {', '.join(example)}, or none "
                "at all for an example; this one is missing"
            )
        value, wanted = given[name], "a list of tensors" if lists else "a torch.Tensor"
        tensors = value if lists else [value]
        if not isinstance(tensors, (list, tuple)) or not all(map(torch.is_tensor, tensors)):
            raise TypeError(f"{name}: expected {wanted}, got {type(value).__name__}")


def _device(values: Iterable) -> str:
    """The type of the first tensor's device; "cpu" where there is none."""
    for value in values:
        if isinstance(value, torch.Tensor):
            return value.device.type
        if isinstance(value, (list, tuple)) and value:
            return _device(value)
    return "cpu"


@constant_result
def forced_backend(op: str) -> str | None:
    """The backend that the operator's environment variable asks for, if any."""
    variable = _OPERATORS[op].variable
    forced = os.environ.get(variable)
    if not forced:
        return None
    known = BACKENDS if variable == "FASTVLP_BACKEND" else tuple(_OPERATORS[op].candidates)
    if forced not in known:
        raise ValueError(f"{variable}: expected one of {', '.join(known)}; got {forced!r}")
    return forced
