"""`EmaModel`: a momentum copy of a module, for evaluation or as the teacher of distillation.

The copy's tensors never move: pointer tables, captured graphs and sharded parameters stay valid.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..ops import ema
from ._module_structure import Snapshot, differences, matching_slots

Decay = float | torch.Tensor | Callable[[int], float | torch.Tensor]


@dataclass(frozen=True)
class EmaWarmup:
    """A decay that grows to `decay`: 1 - (1 + n / gamma)^-power at update n, as timm's
    ModelEmaV3 with use_warmup; until `start` updates are done the momentum copies the model.

    gamma 1 and power 2/3 suit runs of a million steps, power 3/4 shorter ones.
    """

    decay: float = 0.9999
    gamma: float = 1.0
    power: float = 2 / 3
    start: int = 0
    minimum: float = 0.0

    def __call__(self, update: int) -> float:
        n = max(0, update - self.start - 1)
        if n == 0:
            return 0.0
        return max(min(1 - (1 + n / self.gamma) ** -self.power, self.decay), self.minimum)


class EmaModel(nn.Module):
    """Momentum copy of `model`: m <- d m + (1 - d) p for every parameter, in one pass.

        ema = EmaModel(model, decay=0.995, copy_dtype=torch.bfloat16)
        ...
        optimizer.step()
        ema.update()
        with torch.no_grad():
            targets = ema(images)           # the bfloat16 copy computes

    Args:
        model: any module; the one inside of DistributedDataParallel or torch.compile is taken.
            Pairs of towers as in ALBEF: wrap them in an nn.ModuleList.
        decay: d; a number, a tensor of one value on the parameters' device, or a function of the
            number of updates done so far, for example `EmaWarmup`.
        buffers: "copy" copies all buffers (BatchNorm's statistics are averages already);
            "average" averages those of floating or complex dtype; others are always copied.
        dtype: least precision of the momentum: float32 keeps a float32 average of a bfloat16
            model, where steps of 1 - d would round to nothing. None keeps the model's dtypes.
        copy_dtype: also keep a low-precision copy of the momentum module, written in the same
            pass, in `copy`. `forward` then runs the copy.
        module: the module to hold the momentum, already built and sharded like `model`; needed for
            FSDP2 modules, which cannot be copied. None: a deep copy. It takes the model's values.
        copy: the same for the low-precision copy.

    The momentum module and its copy are in evaluation mode, whatever mode the model is in, and stay
    in it when a module that holds this one is set to training. A teacher that is to have dropout is
    set to training by itself: `ema.module.train()`.

    Tensors of the model that were replaced are followed. Where its submodules were (another head,
    an adapter around a layer, a block more or less) updates raise ValueError from then on, because
    the momentum module computes what the model did before: make a new EmaModel of the changed
    model, or change `ema.module`, and `ema.copy` if there is one, in the same way. Buffers that no
    state_dict has, such as the tables that some modules make when they are first called, may be in
    one of them alone.

    Tied parameters are updated once, frozen ones like all others. DTensor parameters are updated
    shard by shard. The state_dict holds the momentum module under `module.` and the number of
    updates; the copy is made again on loading, to the bit.

    Examples:
        >>> import torch
        >>> from fastvlp import EmaModel
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> momentum = EmaModel(model, decay=0.75)
        >>> with torch.no_grad():
        ...     before = model.weight.clone()
        ...     model.weight += 1.0
        >>> momentum.update()
        >>> torch.allclose(momentum.module.weight, before + 0.25)
        True
    """

    def __init__(
        self,
        model: nn.Module,
        decay: Decay = 0.9999,
        *,
        buffers: str = "copy",
        dtype: torch.dtype | None = torch.float32,
        copy_dtype: torch.dtype | None = None,
        module: nn.Module | None = None,
        copy: nn.Module | None = None,
    ):
        super().__init__()
        if buffers not in ("copy", "average"):
            raise ValueError(f"buffers: expected 'copy' or 'average', got {buffers!r}")
        self.decay = decay
        self.buffers_policy = buffers
        self.num_updates = 0
        # In a list, so that the model is no submodule: its parameters are not ours.
        self._model = [unwrap(model)]
        self.module = _momentum_module(self._model[0], module, dtype)
        if copy is None and copy_dtype is not None:
            copy = deepcopy(self.module).to(copy_dtype)
        self.copy = None if copy is None else copy.requires_grad_(False)
        self.eval()
        self._swapped = False
        self._tensors = _Correspondence(self._model[0], self.module, self.copy)
        self.copy_model()
        self.register_state_dict_post_hook(_drop_copy)
        self.register_load_state_dict_pre_hook(_expect_no_copy)
        self.register_load_state_dict_post_hook(_refresh_copy)

    @property
    def model(self) -> nn.Module:
        """The module whose momentum this is."""
        return self._model[0]

    def train(self, mode: bool = True) -> "EmaModel":
        """Leaves the evaluation mode as it is, so that a parent's `train()` does not end it."""
        return self if mode else super().train(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the low-precision copy where there is one, else the momentum module."""
        return (self.module if self.copy is None else self.copy)(*args, **kwargs)

    def current_decay(self) -> float | torch.Tensor:
        """The decay of the next update."""
        return self.decay(self.num_updates) if callable(self.decay) else self.decay

    def update(self, *, check_finite: bool = False) -> None:
        """One update from the model's present values, in place.

        With `check_finite` a NaN or an infinity in a parameter or averaged buffer raises
        FloatingPointError before anything is written; on a GPU this waits for the device.
        """
        self.update_rest(frozenset(), check_finite=check_finite)

    def check_rest(self, done: frozenset[int]) -> None:
        """Raises what `update_rest` would of tensors that do not match; writes nothing."""
        self._tensors.check(done)

    def update_rest(self, done: frozenset[int], *, check_finite: bool = False) -> None:
        """`update` without the parameters, known by identity, whose momentum an optimiser has
        updated already."""
        self.refuse_while_swapped("update()")
        self._tensors.move(
            self.current_decay(), self.buffers_policy == "average", done, check_finite
        )
        self.num_updates += 1

    def follow(self, model: nn.Module) -> None:
        """Updates come from `model` from now on.

        Raises:
            ValueError: its submodules or its tensors are not those of the momentum.
        """
        model = unwrap(model)
        tensors = _Correspondence(model, self.module, self.copy)
        self._model[0], self._tensors = model, tensors

    def copy_model(self) -> None:
        """The momentum takes the model's present values, averaged or not."""
        self.refuse_while_swapped("copy_model()")
        self._tensors.move(0.0, average_buffers=False)

    def refresh_copy(self) -> None:
        """The low-precision copy takes the momentum's values, after they were set by hand."""
        self._tensors.refresh_copy()

    def pairs(self) -> dict[int, tuple[torch.Tensor, torch.Tensor | None]]:
        """For the identity of each parameter of the model: its momentum and its copy."""
        return self._tensors.pairs()

    @contextmanager
    def swap(self) -> Iterator[nn.Module]:
        """The model computes with the momentum's values while the with block lasts.

        Values change places, storage does not. Tensors of equal dtype trade values, at the cost of
        one tensor of memory; where dtypes differ the model's value is kept aside. Leaving restores
        both to the bit, after an exception too.
        """
        self.refuse_while_swapped("swap()")
        self._swapped = True
        held: list[tuple] = []
        try:
            for theirs, ours in self._tensors.unique():
                held.append((theirs, ours, _exchange(theirs, ours)))
            yield self.model
        finally:
            with torch.no_grad():
                for theirs, ours, kept in reversed(held):
                    _exchange(theirs, ours) if kept is None else theirs.copy_(kept)
            self._swapped = False

    def refuse_while_swapped(self, what: str) -> None:
        """Raises RuntimeError, naming the call `what`, inside of `swap`."""
        if self._swapped:
            raise RuntimeError(
                f"{what}: the model and its momentum are swapped; leave swap() first"
            )

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self.refuse_while_swapped("state_dict()")
        return super().state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self.refuse_while_swapped("load_state_dict()")
        return super().load_state_dict(*args, **kwargs)

    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor(self.num_updates)

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.num_updates = int(state)


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside of DistributedDataParallel, DataParallel and torch.compile."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while True:
        if isinstance(model, wrappers):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def _momentum_module(model, module, dtype):
    if module is None:
        module = deepcopy(model)
        if dtype is not None:
            smaller = torch.finfo(dtype).bits

            def widened(t):
                wide = dtype.to_complex() if t.is_complex() else dtype
                return t.to(wide) if _averages(t) and torch.finfo(t.dtype).bits < smaller else t

            module = module._apply(widened)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    return module


@torch.no_grad()
def _exchange(theirs: torch.Tensor, ours: torch.Tensor) -> torch.Tensor | None:
    held = theirs.clone()
    theirs.copy_(ours)
    if theirs.dtype != ours.dtype:
        return held
    ours.copy_(held)
    return None


def _drop_copy(module, state, prefix, _):
    for key in [key for key in state if key.startswith(prefix + "copy.")]:
        del state[key]


def _expect_no_copy(module, state, prefix, *_):
    # What the copy holds is a function of the momentum; `_refresh_copy` computes it.
    if module.copy is not None:
        for key, value in module.copy.state_dict().items():
            state.setdefault(f"{prefix}copy.{key}", value)


def _refresh_copy(module, _):
    module.refresh_copy()


def _averages(t: torch.Tensor) -> bool:
    return t.is_floating_point() or t.is_complex()


def _real(t: torch.Tensor) -> torch.Tensor:
    """What `ema` averages of a tensor: real and imaginary parts on their own."""
    return torch.view_as_real(t) if t.is_complex() else t


class _Correspondence:
    """Which tensor of the momentum and of the copy belongs to which of the model.

    Found once; a tensor that was replaced since (by `.to()`, or by assignment) is found again.
    Submodules must be as at the beginning, or have changed alike in all.
    """

    def __init__(self, model: nn.Module, momentum: nn.Module, copy: nn.Module | None):
        self._modules = [module for module in (model, momentum, copy) if module is not None]
        # Modules that the caller made may be of other types.
        self._different = self._differences()
        self._find()

    def _differences(self) -> set[str]:
        model, *others = self._modules
        return {
            difference
            for other, where in zip(others, ("momentum", "copy"), strict=False)
            for difference in differences(model, other, where)
        }

    def _find(self) -> None:
        # Kept only when all of it is found: after a refusal the next call must look again.
        if changed := self._differences() - self._different:
            raise ValueError(
                f"model: its submodules changed since the EmaModel was made: "
                f"{'; '.join(sorted(changed)[:3])}. Make a new EmaModel of the model as it is now, "
                "or change the EmaModel's `module` and `copy` alike; nothing was written"
            )
        found, parameters = [], 0
        for kind in ("_parameters", "_buffers"):
            slots = matching_slots(self._modules, kind)
            found += [(name, [each[name] for each in slots]) for name in slots[0]]
            if kind == "_parameters":
                parameters = len(found)
        rows = [(name, [owner[key] for owner, key in places]) for name, places in found]
        _refuse_mismatch(rows)
        self._sort(rows, parameters)
        self._snapshot = Snapshot(self._modules)

    def _sort(self, rows, count: int) -> None:
        parameters, averaged, others, seen = [], [], [], set()
        for at, (name, row) in enumerate(rows):
            if id(row[1]) in seen:  # tied
                continue
            seen.add(id(row[1]))
            kind = parameters if at < count else averaged
            (kind if _averages(row[0]) else others).append((name, row))
        self._groups = parameters, averaged, others
        self._columns = _columns(parameters)
        self._complex = any(t.is_complex() for _, row in rows for t in row)

    def _current(self):
        if not self._snapshot.holds():
            self._find()
        return self._groups

    def unique(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Tensors of the model and of the momentum, ties once."""
        return ((row[0], row[1]) for group in self._current() for _, row in group)

    def pairs(self):
        parameters, _, _ = self._current()
        return {id(row[0]): (row[1], row[2] if len(row) > 2 else None) for _, row in parameters}

    def check(self, done: frozenset[int]) -> None:
        """Refuses mismatched tensors, all but the parameters in `done`, before any is written."""
        parameters, floats, others = self._current()
        rest = [each for each in parameters if id(each[1][0]) not in done]
        _refuse_mismatch([*rest, *floats, *others])

    def move(
        self,
        decay: float | torch.Tensor,
        average_buffers: bool,
        done: frozenset[int] = frozenset(),
        check_finite: bool = False,
    ) -> None:
        """Updates everything but the momentum of the parameters in `done`.

        Buffers are checked before the first write, parameters by the operator itself; should a
        part fail all the same after others were written, RuntimeError says which.
        """
        parameters, floats, others = self._current()
        if not (done or floats or others or self._complex):
            return _average(parameters, self._columns, decay, check_finite)
        _refuse_mismatch([*floats, *others])
        averaged = [each for each in parameters if id(each[1][0]) not in done]
        copied = floats
        if average_buffers:
            averaged, copied = averaged + floats, []
        parts = (
            ("parameters and averaged buffers", averaged, decay, check_finite),
            ("buffers of floating dtype", copied, 0.0, False),
            ("other buffers", others, None, False),
        )
        written = []
        for what, rows, part_decay, part_check in parts:
            try:
                _run(rows, part_decay, part_check, self._complex)
            except Exception as error:
                if not written:
                    raise
                raise RuntimeError(
                    f"the momentum was written for its {' and '.join(written)}, not for its "
                    f"{what}: {error}"
                ) from error
            if rows:
                written.append(what)

    @torch.no_grad()
    def refresh_copy(self) -> None:
        """Writes the copy again from the momentum."""
        if len(self._modules) < 3:
            return
        for group in self._current():
            for _, row in group:
                row[2].copy_(row[1])


def _refuse_mismatch(named_rows) -> None:
    for name, row in named_rows:
        for where, t in zip(("momentum", "copy"), row[1:], strict=False):
            # Buffers of other dtypes are copied, from wherever they are.
            elsewhere = _averages(row[0]) and t.device != row[0].device
            if t.shape != row[0].shape or elsewhere:
                raise ValueError(
                    f"{name}: expected the same shape and device in the model and its {where}, "
                    f"got {tuple(row[0].shape)} on {row[0].device} and {tuple(t.shape)} on "
                    f"{t.device}; nothing was written. Make a new EmaModel of a model that changed"
                )
            if t.is_complex() != row[0].is_complex():
                raise ValueError(
                    f"{name}: expected complex values in the model and its {where} or in neither, "
                    f"got {row[0].dtype} and {t.dtype}; leave out copy_dtype, which is real"
                )


def _run(named_rows, decay, check_finite, complex_values) -> None:
    """Moves the rows by one call of `ema`; without a decay copies them, whatever their dtype."""
    if decay is None:
        with torch.no_grad():
            for _, row in named_rows:
                for ours in row[1:]:
                    ours.copy_(row[0])
        return
    columns = _columns(named_rows)
    if complex_values:
        columns = [list(map(_real, column)) for column in columns]
    _average(named_rows, columns, decay, check_finite)


def _columns(named_rows) -> list[list[torch.Tensor]]:
    """The tensors of the model, of the momentum and of the copy."""
    return [list(column) for column in zip(*(row for _, row in named_rows), strict=True)]


def _average(named_rows, columns, decay, check_finite) -> None:
    """Moves the rows, whose tensors are the columns, by one call of `ema`."""
    if not columns:
        return
    source, momentum, copies = (*columns, None)[:3]
    found = ema(momentum, source, decay, copies, check_finite=check_finite)
    if check_finite and (last := found.item()) >= 0:
        raise FloatingPointError(
            f"{named_rows[last][0]}: expected finite values; nothing was written to the momentum"
        )
