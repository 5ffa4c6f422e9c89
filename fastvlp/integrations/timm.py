"""`ModelEmaV3`: timm's exponential moving average, computed by fastvlp's momentum update.

    from fastvlp.integrations.timm import ModelEmaV3  # instead of: timm.utils

Constructor, calls and state_dict are timm's; a checkpoint of either loads into the other.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import nn

from fastvlp.nn.ema_model import EmaModel, EmaWarmup, unwrap


class ModelEmaV3(EmaModel):
    """An `EmaModel` that is made, called and saved as timm's class of this name.

    Args:
        model: whose average to keep; the one inside of DistributedDataParallel or torch.compile is
            taken.
        decay, min_decay, update_after_step, use_warmup, warmup_gamma, warmup_power: as in timm; the
            last five count where `update` is told the step.
        device: where the average is kept. Elsewhere than the model, it costs one more copy of the
            model there.
        dtype: of the average. None: float32 for half-precision weights, where timm keeps their
            dtype and rounds at random; else the weights' own.
        stochastic_rounding, stochastic_rounding_seed, foreach: accepted, and without effect: the
            update is one pass, and float32 needs no random rounding.
        exclude_buffers: copy buffers instead of averaging those of floating dtype.

    Raises:
        ValueError: from `update` and `set`, the model's submodules are not those it had.

    Examples:
        >>> import torch
        >>> from fastvlp.integrations.timm import ModelEmaV3
        >>> model = torch.nn.Linear(2, 1)
        >>> ema = ModelEmaV3(model, decay=0.999, use_warmup=True)
        >>> for step in range(3):
        ...     ema.update(model, step=step)
        >>> sorted(ema.state_dict())
        ['module.bias', 'module.weight']
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.9999,
        min_decay: float = 0.0,
        update_after_step: int = 0,
        use_warmup: bool = False,
        warmup_gamma: float = 1.0,
        warmup_power: float = 2 / 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        stochastic_rounding: bool = True,
        stochastic_rounding_seed: int = 0,
        foreach: bool = True,
        exclude_buffers: bool = False,
    ) -> None:
        followed, module = unwrap(model), None
        elsewhere = device is not None and torch.device(device) != _device(followed)
        if elsewhere:
            followed = deepcopy(followed).to(device)
        if dtype is not None:
            module = deepcopy(followed).to(dtype)
        buffers = "copy" if exclude_buffers else "average"
        super().__init__(followed, decay, buffers=buffers, module=module)
        self._is_mirror = elsewhere
        self._decay, self.min_decay = decay, min_decay
        self.update_after_step = update_after_step
        self.use_warmup, self.warmup_gamma = use_warmup, warmup_gamma
        self.warmup_power = warmup_power
        self._step: int | None = None
        self.register_state_dict_post_hook(_drop_count)
        self.register_load_state_dict_pre_hook(_expect_no_count)

    def get_decay(self, step: int | None = None) -> float:
        """The decay at a step; `decay` itself without one."""
        if step is None:
            return self._decay
        start, warmup = self.update_after_step, (self.warmup_gamma, self.warmup_power)
        if not self.use_warmup:
            return self._decay if step > start + 1 else 0.0
        return EmaWarmup(self._decay, *warmup, start, self.min_decay)(step)

    def current_decay(self) -> float | torch.Tensor:
        """The decay of the update under way, or without one that of no particular step."""
        return self.get_decay(self._step)

    def update(  # type: ignore[override]  # the model comes first, as in timm
        self, model: nn.Module | None = None, step: int | None = None, *, check_finite: bool = False
    ) -> None:
        """One update from the values of `model`, by default of the one it was made for.

        Args:
            model: of the same structure.
            step: of the training, for `use_warmup` and `update_after_step`.
            check_finite: as in `EmaModel.update`.
        """
        self._follow(model)
        self._step = step
        try:
            super().update(check_finite=check_finite)
        finally:
            self._step = None

    def set(self, model: nn.Module) -> None:
        """The average takes the values of `model`."""
        self._follow(model)
        self.copy_model()

    @torch.no_grad()
    def _follow(self, model: nn.Module | None) -> None:
        if model is None:
            if self._is_mirror:
                raise TypeError("model: expected the model, whose average is on another device")
            return
        model = unwrap(model)
        if self._is_mirror:
            self.model.load_state_dict(model.state_dict())
        elif model is not self.model:
            self.follow(model)


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _drop_count(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    del state[f"{prefix}_extra_state"]  # the number of updates, which timm's has not


def _expect_no_count(module: ModelEmaV3, state: dict[str, Any], prefix: str, *_: Any) -> None:
    state.setdefault(f"{prefix}_extra_state", module.get_extra_state())
