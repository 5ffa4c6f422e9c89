"""Learning rates of the three systems, as functions of the step alone.

Steps count from 0. A schedule is a `Schedule`, called with the step that is about to be taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["cosine", "linear", "staircase"]


@dataclass(frozen=True)
class Schedule:
    """The learning rate of each step.

    Attributes:
        kind: "cosine" of CLIP, "linear" of ViLT, "staircase" (step-wise) of ALBEF; see the
            functions below.
        lr: the highest rate.
        steps: of the whole run.
        warmup: warmup steps.
        final: the rate that the decay ends at.
        warmup_from: learning rate at the start of warmup ("staircase" only).
        epoch_steps: steps of an epoch ("staircase" only).
    """

    kind: Kind
    lr: float
    steps: int
    warmup: int = 0
    final: float = 0.0
    warmup_from: float = 0.0
    epoch_steps: int = 1

    def __call__(self, step: int) -> float:
        return _KINDS[self.kind](self, step)


def cosine(s: Schedule, step: int) -> float:
    """CLIP: a linear warmup that reaches the rate at its last step, then half a cosine, by step.

    Radford et al. 2021, section 2.5, with the warmup of open_clip: lr (step + 1) / warmup.
    """
    if step < s.warmup:
        return s.lr * (step + 1) / s.warmup
    done = (step - s.warmup) / max(1, s.steps - s.warmup)
    return s.final + (s.lr - s.final) * (1 + math.cos(math.pi * min(1.0, done))) / 2


def linear(s: Schedule, step: int) -> float:
    """ViLT: a linear warmup from 0, then a linear decay that would reach `final` at step `steps`.

    Kim et al. 2021, section 4.2. The first step of a warmup has rate 0, as in their code.
    """
    if step < s.warmup:
        return s.lr * step / s.warmup
    left = (s.steps - step) / max(1, s.steps - s.warmup)
    return s.final + (s.lr - s.final) * max(0.0, left)


def step_wise(s: Schedule, step: int) -> float:
    """ALBEF's "staircase", step-wise: a warmup of 20 levels, then a cosine by epoch.

    Li et al. 2021, section 3.5, with the levels of their code, which last 100 steps there and
    `warmup` / 20 here. Their warmup ends with the first epoch; here it lasts its steps even where
    epochs are shorter, as those of small data sets are.
    """
    levels = 20
    if step < s.warmup:
        return s.warmup_from + (s.lr - s.warmup_from) * (levels * step // s.warmup) / levels
    epoch, epochs = step // s.epoch_steps, max(1, math.ceil(s.steps / s.epoch_steps))
    return s.final + (s.lr - s.final) * (1 + math.cos(math.pi * epoch / epochs)) / 2


_KINDS: dict[str, Callable[[Schedule, int], float]] = {
    "cosine": cosine,
    "linear": linear,
    "staircase": step_wise,
}
