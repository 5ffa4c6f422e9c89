"""`Task`: what the training loop has to know of a system."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastvlp.grad_cache import no_sync
from fastvlp.nn.ema_model import EmaModel


class Task:
    """How a system is trained: the loop calls these methods and knows nothing else of it.

    A subclass sets `model` and writes `losses`, `split` and `evaluate`; the rest has defaults.

    Attributes:
        model: the module as it was built. What the methods are given as `model` is this or a
            wrapper of it that synchronises ranks.
        forward_methods: names of the methods beside forward that evaluation calls on the model.
        chunk_size: rows that go through the model at a time; None for all of them.
        momentum: the momentum encoder of the model, which the optimiser moves with each step.
    """

    model: nn.Module
    forward_methods: Sequence[str] = ()
    chunk_size: int | None = None
    momentum: EmaModel | None = None

    def losses(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """The losses of a batch. "loss" is what is minimised, the others are logged beside it.

        Over ranks a batch may have no rows, because none of its images could be decoded: the
        losses are then 0 and every parameter gets a gradient, of zeros.
        """
        raise NotImplementedError

    def split(self, batch: Any, rows: int, least: int = 1) -> Iterable[tuple[Any, float]]:
        """Parts of at most `rows` rows, each with its weight in the batch's loss.

        There are at least `least` of them, the last ones without rows.
        """
        raise NotImplementedError

    def backward(
        self, model: nn.Module, batch: Any, scale: float = 1.0, sizes: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """Adds the gradients of `scale` times the loss to `.grad`; returns the losses, detached.

        In chunks the losses are weighted means over them: exact where a loss is a mean over rows.
        Contrastive losses are not; their tasks use `GradCache` here. Over ranks the losses are
        weighted likewise, so that the mean over the ranks is that over all rows.

        Args:
            sizes: the rows of the step on each rank, more than 0 in all; None for a single rank,
                or losses that weigh the ranks themselves.
        """
        share = 1.0 if sizes is None else len(batch) * len(sizes) / sum(sizes)
        parts = [(batch, 1.0)]
        if self.chunk_size is not None:
            # Wrapped models communicate in each pass: every rank makes equally many.
            most = -(-max(sizes or [1]) // self.chunk_size)
            parts = list(self.split(batch, self.chunk_size, most))
        total: dict[str, Tensor] = {}
        for i, (part, weight) in enumerate(parts):
            weight *= share
            with no_sync([] if i == len(parts) - 1 else [*model.modules()]):
                losses = self.losses(model, part)
                with torch.autocast(losses["loss"].device.type, enabled=False):
                    (losses["loss"] * (scale * weight)).backward()
            for name, value in losses.items():
                total[name] = total.get(name, 0) + weight * value.detach()
        return total

    def uses_weight_decay(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether weight decay applies to a parameter."""
        return parameter.ndim > 1

    def blocks(self) -> list[nn.Module]:
        """The repeated parts of the model: what is sharded, compiled or recomputed one by one."""
        return []

    def after_step(self) -> None:
        """Called after each optimiser step that was taken, not after one that was skipped."""

    def metrics(self) -> dict[str, float]:
        """What to log beside the losses, such as the temperature."""
        return {}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Scores of `model` on the held-out data; called on all ranks, in evaluation mode."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors to keep in a checkpoint that are not the model's."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes back what `state_dict` gave."""

    def save_tokenizer(self, folder: Path) -> None:
        """Writes the tokenizer, which the checkpoints of a run need to be of use."""

    def save(self, model: nn.Module, folder: Path) -> None:
        """Writes what is needed to use the trained model."""
        raise NotImplementedError
