"""`AdamWEma`: AdamW that also keeps a momentum model and low-precision copies, in one pass."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import ParamsT

from .nn.ema_model import EmaModel, unwrap
from .ops import adamw_ema, last_exceeding
from .ops.ema.multi_tensor import LARGEST, check_adamw, square_limit

_REFUSED = ("amsgrad", "capturable", "differentiable")
# In the groups of a state: how many updates the EmaModel saved with it had.
_UPDATES = "ema_updates"


class AdamWEma(torch.optim.Optimizer):
    """torch.optim.AdamW, the update of an `EmaModel` and low-precision copies, in one pass.

        ema = EmaModel(model, decay=0.995, copy_dtype=torch.bfloat16)
        optimizer = AdamWEma(model.parameters(), lr=1e-4, ema=ema)
        ...
        loss.backward()
        optimizer.step()                # weights, momentum, momentum copy

    A step does what AdamW.step() and ema.update() do. Parameters of the momentum model that get no
    step (frozen, without gradient, in no group) and buffers are brought up to date with it.

    Args:
        params, lr, betas, eps, weight_decay, maximize: as torch.optim.AdamW; lr may be a
            CPU tensor.
        amsgrad, capturable, differentiable: must be False.
        ema: the momentum model to update with each step, or None.
        copy: a low-precision module like the model, for example
            `copy.deepcopy(model).to(torch.bfloat16)`, which receives the new weights. A parameter
            without gradient of its own takes the one of its copy, so that the copy may be what
            computes the loss; zero_grad() clears both.
        model: the module that `copy` is a copy of; taken from `ema` where there is one.
        check_finite: looks through gradients and weights first; a NaN, an infinity or a gradient
            whose square overflows raises FloatingPointError before anything is written. On a GPU
            this waits for the device.
        foreach, fused: accepted because trainers pass them to every AdamW, and without effect: a
            step is always one pass.

    The state (step, exp_avg, exp_avg_sq) is AdamW's: a state_dict of either loads into the other.
    The momentum is not in it, but in the EmaModel's state_dict; with an `ema` the state says how
    many updates that had. An AdamWEma without `ema` refuses such a state, and one whose `ema` has
    not been brought to the same number of updates refuses its next step: it would average from
    other weights. Save and load both.

    Every group's options are checked when it is added or loaded, before anything changes.
    amsgrad, capturable and differentiable are not supported and refused, in a loaded state too.

    Examples:
        >>> import torch
        >>> from fastvlp import EmaModel
        >>> from fastvlp.optim import AdamWEma
        >>> model = torch.nn.Linear(8, 4)
        >>> momentum = EmaModel(model, decay=0.995)
        >>> optimizer = AdamWEma(model.parameters(), ema=momentum, lr=1e-3)
        >>> model(torch.randn(2, 8)).square().mean().backward()
        >>> optimizer.step()  # AdamW, and the momentum update
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        ema: EmaModel | None = None,
        copy: nn.Module | None = None,
        model: nn.Module | None = None,
        check_finite: bool = False,
    ):
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "amsgrad": amsgrad, "maximize": maximize, "foreach": None, "capturable": capturable,
            "differentiable": differentiable, "fused": None, "decoupled_weight_decay": True,
        }  # fmt: skip
        self._check_options(defaults, "")
        for name, value in (("foreach", foreach), ("fused", fused)):
            if not isinstance(value, bool | None):
                raise TypeError(f"{name}: expected True, False or None, got {value!r}")
        super().__init__(params, defaults)
        self.ema, self.check_finite = ema, check_finite
        self._expected_updates: int | None = None
        self._copies = _copies(copy, model if ema is None else ema.model)

    def add_param_group(self, param_group: dict) -> None:
        """Adds parameters with options of their own; the defaults stand in for those left out."""
        if isinstance(param_group, dict):
            options = {**self.defaults, **param_group}
            self._check_options(options, f" (group {len(self.param_groups)})")
        super().add_param_group(param_group)

    @staticmethod
    def _check_options(group: dict, where: str) -> None:
        for name in _REFUSED:
            if group.get(name):
                raise ValueError(f"{name}: AdamWEma does not support it{where}; leave it out")
        try:
            check_adamw(*(group[name] for name in ("lr", "betas", "eps", "weight_decay")))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error}{where}") from None

    def state_dict(self) -> dict:
        """AdamW's state, and with an `ema` how many updates that has had."""
        state = super().state_dict()
        if self.ema is not None:
            for group in state["param_groups"]:
                group[_UPDATES] = self.ema.num_updates
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the state of an AdamWEma or of a torch.optim.AdamW.

        Raises:
            ValueError: the state was saved with an EmaModel, and there is none here; or has
                options that are not supported. Nothing was loaded.
        """
        groups = state_dict["param_groups"]
        for i, group in enumerate(groups):
            self._check_options({**self.defaults, **group}, f" (group {i} of the state)")
        updates = max((group[_UPDATES] for group in groups if _UPDATES in group), default=None)
        if updates is not None and self.ema is None:
            raise ValueError(
                f"state_dict: it belongs to an AdamWEma with an EmaModel of {updates} updates, "
                "which does not lie in it; make this one with ema= and load the EmaModel's own "
                "state_dict too"
            )
        plain = [{k: v for k, v in group.items() if k != _UPDATES} for group in groups]
        super().load_state_dict({**state_dict, "param_groups": plain})
        self._expected_updates = updates

    def _refuse_other_momentum(self, ema: EmaModel) -> None:
        ema.refuse_while_swapped("step()")
        if self._expected_updates not in (None, ema.num_updates):
            raise RuntimeError(
                f"step(): the loaded state was saved with an EmaModel of "
                f"{self._expected_updates} updates, this one has {ema.num_updates}; load the "
                "EmaModel's state_dict too, or set ema.num_updates to average from its present "
                "weights. Nothing was written"
            )
        self._expected_updates = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients of the parameters and of their copies."""
        super().zero_grad(set_to_none)
        for copy in self._copies.values():
            if copy.grad is None:
                continue
            if set_to_none:
                copy.grad = None
            else:
                copy.grad.detach_().zero_()

    # torch annotates closures as returning floats; they return tensors.
    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], torch.Tensor] | None = None
    ) -> torch.Tensor | None:
        """One step; returns the closure's loss.

        Everything is checked before the first write. Should a later part of the step fail all the
        same, RuntimeError says which parts were written; their `step` counts it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.ema is not None:
            self._refuse_other_momentum(self.ema)
        batches = self._batches()
        if self.ema is not None:
            self.ema.check_rest(frozenset(id(row[0]) for rows in batches.values() for row in rows))
        if self.check_finite:
            self._refuse_nonfinite([row for batch in batches.values() for row in batch])
        done: set[int] = set()
        total = sum(map(len, batches.values()))
        try:
            for key, rows in batches.items():
                self._run(key, rows)
                done |= {id(row[0]) for row in rows}
        except Exception as error:
            if not done:
                raise
            raise RuntimeError(
                f"the step was taken for {len(done)} of {total} parameters (those before this "
                f"batch of {len(rows)}), with their momentum and copies, and for no other: {error}"
            ) from error
        if self.ema is not None:
            self._update_rest(self.ema, frozenset(done))
        return loss

    def _update_rest(self, ema: EmaModel, done: frozenset[int]) -> None:
        try:
            ema.update_rest(done)
        except Exception as error:
            if not done:
                raise
            raise RuntimeError(
                f"the step was taken for all {len(done)} parameters that have a gradient, with "
                "their momentum and copies; the update of the rest of the momentum model failed "
                f"and is not counted in num_updates: {error}"
            ) from error

    def _batches(self) -> dict[tuple, list[tuple]]:
        """What one call can take: rows of one group, step, device and kind."""
        pairs = {} if self.ema is None else self.ema.pairs()
        batches = defaultdict(list)
        for index, group in enumerate(self.param_groups):
            for p in group["params"]:
                copy = self._copies.get(id(p))
                g = _gradient(p, copy)
                if g is None:
                    continue
                state = self.state.get(p) or _fresh_state(p)
                momentum, momentum_copy = pairs.get(id(p), (None, None))
                row = (
                    p, g, state["exp_avg"], state["exp_avg_sq"], momentum, copy, momentum_copy,
                    state["step"], state,
                )  # fmt: skip
                kind = tuple(t is not None for t in row[4:7])
                batches[index, float(state["step"]) + 1, p.device, kind].append(row)
        return batches

    def _run(self, key: tuple, rows: list[tuple]) -> None:
        index, step, _, kind = key
        group = self.param_groups[index]
        columns = list(zip(*rows, strict=True))
        extra = [c if there else () for c, there in zip(columns[4:7], kind, strict=True)]
        adamw_ema(
            *columns[:4], *extra, step=step, lr=float(group["lr"]), betas=group["betas"],
            eps=group["eps"], weight_decay=group["weight_decay"], maximize=group["maximize"],
            decay=0.0 if self.ema is None else self.ema.current_decay(),
        )  # fmt: skip
        torch._foreach_add_(list(columns[7]), 1.0)
        for row in rows:
            self.state[row[0]] = row[8]

    def _refuse_nonfinite(self, rows: list[tuple]) -> None:
        by_device = defaultdict(list)
        for row in rows:
            by_device[row[0].device].append(row)
        for found in by_device.values():
            for what, at, limit in (("gradient", 1, square_limit()), ("weight", 0, LARGEST)):
                last = int(last_exceeding([row[at] for row in found], limit))
                if last >= 0:
                    raise FloatingPointError(
                        f"the {what} of {self._name(found[last][0])}: expected finite values; "
                        "nothing was written"
                    )

    def _name(self, parameter: torch.Tensor) -> str:
        for i, group in enumerate(self.param_groups):
            for j, p in enumerate(group["params"]):
                if p is parameter:
                    return f"parameter {j} of group {i} with shape {tuple(p.shape)}"
        return "a parameter"


def _copies(copy: nn.Module | None, model: nn.Module | None) -> dict[int, torch.Tensor]:
    if copy is None:
        return {}
    if model is None:
        raise ValueError("copy: expected `model` as well, to know which parameter is whose copy")
    theirs = dict(unwrap(model).named_parameters(remove_duplicate=False))
    ours = dict(copy.named_parameters(remove_duplicate=False))
    if theirs.keys() != ours.keys():
        names = sorted(theirs.keys() ^ ours.keys())
        raise ValueError(f"copy: expected the model's parameters; they differ in {names[:5]}")
    return {id(p): ours[name] for name, p in theirs.items()}


def _fresh_state(p: torch.Tensor) -> dict[str, torch.Tensor]:
    moments = {
        name: torch.zeros_like(p, memory_format=torch.preserve_format)
        for name in ("exp_avg", "exp_avg_sq")
    }
    return {"step": torch.tensor(0.0), **moments}


def _gradient(p: torch.Tensor, copy: torch.Tensor | None) -> torch.Tensor | None:
    other = None if copy is None else copy.grad
    if p.grad is not None and other is not None:
        raise RuntimeError(
            f"a parameter of shape {tuple(p.shape)} and its copy both have a gradient; call "
            "zero_grad() before each backward pass, through one of the two"
        )
    g = other if p.grad is None else p.grad
    if g is not None and g.is_sparse:
        raise RuntimeError("AdamWEma does not support sparse gradients; use torch.optim.SparseAdam")
    return g
