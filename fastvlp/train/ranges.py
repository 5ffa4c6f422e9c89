"""The ranges of a configuration's numbers, by the name of the setting; all of them are finite."""

from __future__ import annotations

import math
import typing
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, with or without these two themselves."""

    low: float
    high: float = math.inf
    with_low: bool = True
    with_high: bool = True

    def __contains__(self, value: Real) -> bool:
        above = value >= self.low if self.with_low else value > self.low
        below = value <= self.high if self.with_high else value < self.high
        return above and below and math.isfinite(value)

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"{self.low} or more" if self.with_low else f"more than {self.low}"
        ends = ((self.low, self.with_low), (self.high, self.with_high))
        left_out = [str(end) for end, included in ends if not included]
        without = f", {' and '.join(left_out)} excluded" if left_out else ""
        return f"{self.low} to {self.high}{without}"


POSITIVE = Range(0, with_low=False)
NOT_NEGATIVE = Range(0)
SHARE = Range(0, 1)
DECAY = Range(0, 1, with_high=False)

_KINDS = {int: "a whole number", float: "a number"}

RANGES = {
    "steps": POSITIVE,
    "epochs": POSITIVE,
    "batch_size": POSITIVE,
    "chunk_size": POSITIVE,
    "lr": NOT_NEGATIVE,
    "betas": DECAY,
    "eps": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "clip_norm": POSITIVE,
    "warmup": NOT_NEGATIVE,
    "warmup_lr": NOT_NEGATIVE,
    "final_lr": NOT_NEGATIVE,
    "ema": DECAY,
    "seed": Range(0, 2**32 - 1),
    "max_skipped": POSITIVE,
    "max_broken": SHARE,
    "save_every": POSITIVE,
    "keep": POSITIVE,
    "log_every": POSITIVE,
    "evaluate_every": POSITIVE,
    "mask_rate": Range(0, 1, with_low=False),
    "alpha": SHARE,
    "alpha_epochs": NOT_NEGATIVE,
    "queue_size": POSITIVE,
    "momentum": DECAY,
    "candidates": POSITIVE,
    "end_token": NOT_NEGATIVE,
    "top": POSITIVE,
    "layer": NOT_NEGATIVE,
    "confidence": Range(0, 1, with_low=False, with_high=False),
    "penalty": NOT_NEGATIVE,
}


def check(settings: Any) -> None:
    """Compares every number of a dataclass with its range; a Literal may stand for one.

    Raises:
        TypeError: a value is no number where one belongs.
        ValueError: it is out of its range, infinite or NaN.
    """
    hints = typing.get_type_hints(type(settings))
    for name, kind in numeric_fields(type(settings)).items():
        value = getattr(settings, name)
        if value is None or (isinstance(value, str) and value in _leaves(hints[name])):
            continue
        for number in value if isinstance(value, tuple) else (value,):
            broken = kind is int and not isinstance(number, Integral)
            if isinstance(number, bool) or not isinstance(number, Real) or broken:
                raise TypeError(f"{name}: expected {_KINDS[kind]}, got {number!r}")
            if number not in RANGES[name]:
                raise ValueError(f"{name}: expected {RANGES[name]}, got {number}")


def numeric_fields(cls: type) -> dict[str, type]:
    """Names of the fields that hold numbers, or tuples or None instead, with int or float."""
    hints = typing.get_type_hints(cls)
    kinds = {field.name: _leaves(hints[field.name]) & {int, float} for field in fields(cls)}
    return {name: found.pop() for name, found in kinds.items() if found}


def _leaves(hint: Any) -> set[Any]:
    arguments = typing.get_args(hint)
    return {hint} if not arguments else set().union(*map(_leaves, arguments))
