"""What models that learn from a momentum encoder of their network share."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastvlp.models import base
from fastvlp.models.albef.config import AlbefConfig
from fastvlp.nn.ema_model import EmaModel


class WithMomentum(base.Model):
    """A model whose network is `student`, with or without a momentum encoder as its teacher.

    Subclasses have a method `loss`.

    Attributes:
        student: everything that the momentum encoder repeats.
        momentum: the momentum encoder, an `EmaModel` of `student`, or None.
    """

    def __init__(self, config: AlbefConfig, student: nn.Module, *, with_momentum: bool) -> None:
        super().__init__(config)
        self.student = student
        self.momentum: EmaModel | None = None
        if with_momentum:
            self._add_momentum()

    def _add_momentum(self) -> None:
        copy = self.config.momentum_copy
        self.momentum = EmaModel(
            self.student, self.config.momentum, copy_dtype=copy and getattr(torch, copy)
        )
        self._set_teacher_mode(self.momentum)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """`loss`, so that a wrapper such as DistributedDataParallel can call it."""
        return self.loss(*args, **kwargs)

    @property
    def teacher(self) -> nn.Module:
        """The module that computes for the momentum encoder: its low-precision copy if it has
        one.

        Raises:
            RuntimeError: the model was made without a momentum encoder.
        """
        momentum = self._made_with_momentum("teacher")
        return momentum.module if momentum.copy is None else momentum.copy

    def _made_with_momentum(self, what: str) -> EmaModel:
        if self.momentum is None:
            raise RuntimeError(f"{what}: this model was made without a momentum encoder")
        return self.momentum

    def train(self, mode: bool = True) -> WithMomentum:
        super().train(mode)
        if self.momentum is not None:
            self._set_teacher_mode(self.momentum)
        return self

    def _set_teacher_mode(self, momentum: EmaModel) -> None:
        """Dropout for the momentum encoder where the model has it, as in the authors' code."""
        for module in momentum.children():
            module.train(self.training and self.config.teacher_dropout)

    @torch.no_grad()
    def reset_momentum(self) -> None:
        """The momentum encoder, where there is one, takes the present weights."""
        if self.momentum is None:
            return
        for ours, theirs in zip(
            self.momentum.module.state_dict().values(),
            self.student.state_dict().values(),
            strict=True,
        ):
            ours.copy_(theirs)
        self.momentum.refresh_copy()

    def refresh_copy(self) -> None:
        """The momentum encoder's low-precision copy takes the momentum encoder's values, after they
        were set by hand.

        Raises:
            RuntimeError: the model was made without a momentum encoder.
        """
        self._made_with_momentum("refresh_copy").refresh_copy()

    def update_momentum(self, wanted: bool) -> None:
        """Moves the momentum encoder towards the present weights, as before every use as a
        teacher."""
        if wanted and self.momentum is not None:
            self.momentum.update()
