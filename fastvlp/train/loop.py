"""The training loop: batches in, optimiser steps out, hooks after each.

    loop = Loop(task, model, loader, optimizer, schedule, steps=1000, hooks=[log, save])
    loop.run()

Everything of a system is behind `task`, everything that watches or stores is a hook, and where the
run stands is `loop.state_dict()`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastvlp.train import parallel
from fastvlp.train.tasks.base import Task

Hook = Callable[["Loop", "Report"], None]


@dataclass
class Report:
    """One step: `losses` are this rank's, whose mean over the ranks is that of all pairs, `norm` is
    of the gradients before clipping, and `taken` is False where they were not finite, or no rank
    had a pair, and the step was left out. `pairs` are those of all ranks."""

    losses: dict[str, Tensor]
    lr: float
    norm: float
    taken: bool
    pairs: int


class LossScale:
    """The factor that keeps float16 gradients from vanishing; 1 for other precisions.

    It doubles after `patience` steps and halves with each step whose gradients overflowed
    (Micikevicius et al. 2018, section 3.2).
    """

    def __init__(self, enabled: bool, start: float = 2.0**16, patience: int = 2000) -> None:
        self.enabled, self.patience = enabled, patience
        self.value, self.good = (start if enabled else 1.0), 0

    def update(self, finite: bool) -> None:
        if not self.enabled:
            return
        self.good = self.good + 1 if finite else 0
        if not finite:
            self.value = max(self.value / 2, 1.0)
        elif self.good % self.patience == 0:
            self.value *= 2


class Loop:
    """Trains `task` until `steps` batches were taken from `loader`, epoch after epoch.

    Args:
        task: see `fastvlp.train.tasks.base`.
        model: `task.model`, or the wrapper of it for several ranks.
        loader: iterating gives the batches that are left of an epoch, on this rank.
        optimizer: of the model's parameters; one that keeps a moving average moves it in `step`.
        schedule: the learning rate of each step.
        steps: of the whole run.
        precision: autocast dtype of matmuls, or None.
        clip_norm: largest norm of the gradients over all ranks, more than 0; None for no clipping.
        group: the ranks, or None.
        max_skipped: FloatingPointError after so many steps in a row with gradients that are not
            finite. Such a step leaves weights, averages and optimiser as they were.
        hooks: called after each step with the loop and its report, in order.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        loader: Any,
        optimizer: torch.optim.Optimizer,
        schedule: Callable[[int], float],
        *,
        steps: int,
        precision: torch.dtype | None = None,
        clip_norm: float | None = None,
        group: dist.ProcessGroup | None = None,
        max_skipped: int = 25,
        hooks: Sequence[Hook] = (),
    ) -> None:
        if clip_norm is not None and not 0 < clip_norm < float("inf"):
            raise ValueError(
                f"clip_norm: expected a number more than 0, or None for none, got {clip_norm}"
            )
        self.task, self.model, self.loader = task, model, loader
        self.optimizer, self.schedule, self.steps = optimizer, schedule, steps
        self.precision, self.clip_norm, self.group = precision, clip_norm, group
        self.max_skipped, self.hooks = max_skipped, list(hooks)
        self.scale = LossScale(precision is torch.float16)
        self.device = next(model.parameters()).device
        self.step = self.skipped = self.skipped_in_a_row = self.empty = 0

    def run(self) -> None:
        self.model.train()
        empty = 0
        while self.step < self.steps:
            before = self.step
            for batch in self._batches():
                report = self.train_step(batch)
                self.step += 1
                for hook in self.hooks:
                    hook(self, report)
                if self.step == self.steps:
                    break
            # A run that resumes at the end of an epoch finds nothing left of it, once.
            empty = empty + 1 if self.step == before else 0
            if empty == 2:
                raise ValueError("loader: an epoch has no whole batch; choose a smaller batch_size")

    def _batches(self) -> Iterator[Any]:
        """What the loader gives; last, in place of a batch, the error that it ends with."""
        try:
            yield from self.loader
        except Exception as error:
            yield error

    def train_step(self, batch: Any) -> Report:
        """One forward and backward pass, and the optimiser's step if its gradients are finite.

        A rank whose images could not be decoded takes part without pairs; where no rank has any,
        all leave the step out. In place of a batch there may be the error of this rank's loader:
        then all ranks raise it, for they would wait for this one.
        """
        failed = isinstance(batch, Exception)
        sizes = parallel.sizes(-1 if failed else len(batch), self.group)
        if min(sizes) < 0:
            parallel.raise_first(batch if failed else None, self.group)
        if not any(sizes):
            self.empty += 1
            return Report({}, self.schedule(self.step), 0.0, False, 0)
        with self.autocast():
            losses = self.task.backward(self.model, batch, self.scale.value, sizes)
        gradients = self._gradients()
        norm = parallel.gradient_norm(gradients, self.group).item() / self.scale.value
        finite = norm < float("inf")  # NaN is not
        lr = self.schedule(self.step)
        if finite:
            factor = 1.0
            if self.clip_norm is not None:
                factor = min(1.0, self.clip_norm / max(norm, 1e-12))
            if factor != self.scale.value:
                parallel.scale_(gradients, factor / self.scale.value)
            for options in self.optimizer.param_groups:
                options["lr"] = lr
            self.optimizer.step()
            self.task.after_step()
        self.optimizer.zero_grad()
        self.scale.update(finite)
        self._count(finite)
        return Report(losses, lr, norm, finite, sum(sizes))

    def autocast(self):
        """The context of the run's precision."""
        if self.precision is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.precision)

    def _gradients(self) -> list[Tensor]:
        if self.group is not None and hasattr(self.model, "set_requires_gradient_sync"):
            parallel.average_whole_gradients(self.model, self.group)
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def _count(self, finite: bool) -> None:
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= self.max_skipped:
            raise FloatingPointError(
                f"the gradients of the last {self.skipped_in_a_row} steps were not finite; no "
                f"weight was changed by them. Try a lower lr, a clip_norm, or precision bfloat16"
            )

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands, equal on all ranks."""
        return {
            "step": self.step,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "empty": self.empty,
            "scale": [self.scale.value, self.scale.good],
            "loader": self.loader.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.skipped = state["step"], state["skipped"]
        self.skipped_in_a_row = state["skipped_in_a_row"]
        self.empty = state.get("empty", 0)  # checkpoints of before have none
        self.scale.value, self.scale.good = state["scale"]
        self.loader.load_state_dict(state["loader"])
