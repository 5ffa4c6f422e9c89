"""`EmaModel`: a momentum copy of a module, for evaluation or as the teacher of distillation.

The copy's tensors never move: pointer tables, captured graphs and sharded parameters stay valid.
"""

import copy as copying
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from .ops import ema

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
        decay: d; a number, a tensor of one value beside the parameters, or a function of the
            number of updates done so far, for example `EmaWarmup`.
        buffers: "copy" copies all buffers (BatchNorm's statistics are averages already);
            "average" averages those of floating dtype; others are always copied.
        dtype: least precision of the momentum: float32 keeps a float32 average of a bfloat16
            model, where steps of 1 - d would round to nothing. None keeps the model's dtypes.
        copy_dtype: also keep a low-precision copy of the momentum module, written in the same
            pass, in `copy`. `forward` then runs the copy.
        module: the module to hold the momentum, already built and sharded like `model`; needed for
            FSDP2 modules, which cannot be copied. None: a deep copy. It takes the model's values.
        copy: the same for the low-precision copy.

    Tied parameters are updated once, frozen ones like all others. DTensor parameters are updated
    shard by shard. The state_dict holds the momentum module under `module.` and the number of
    updates; the copy is made again on loading, to the bit.
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
            copy = copying.deepcopy(self.module).to(copy_dtype)
        self.copy = None if copy is None else copy.requires_grad_(False)
        self._swapped = False
        self._tensors = _Correspondence(self._model[0], self.module, self.copy)
        self._tensors.move(0.0, average_buffers=False)
        self.register_state_dict_post_hook(_drop_copy)
        self.register_load_state_dict_pre_hook(_expect_no_copy)
        self.register_load_state_dict_post_hook(_refresh_copy)

    @property
    def model(self) -> nn.Module:
        """The module whose momentum this is."""
        return self._model[0]

    def forward(self, *args, **kwargs):
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
        self._update(frozenset(), check_finite)

    def _update(self, done: frozenset[int], check_finite: bool = False) -> None:
        # `done`: identities of parameters whose momentum an optimiser has updated already.
        self._refuse_while_swapped("update()")
        self._tensors.move(
            self.current_decay(), self.buffers_policy == "average", done, check_finite
        )
        self.num_updates += 1

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
        self._refuse_while_swapped("swap()")
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

    def _refuse_while_swapped(self, what: str) -> None:
        if self._swapped:
            raise RuntimeError(
                f"{what}: the model and its momentum are swapped; leave swap() first"
            )

    def state_dict(self, *args, **kwargs):
        self._refuse_while_swapped("state_dict()")
        return super().state_dict(*args, **kwargs)

    def load_state_dict(self, *args, **kwargs):
        self._refuse_while_swapped("load_state_dict()")
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
        module = copying.deepcopy(model)
        if dtype is not None:
            smaller = torch.finfo(dtype).bits
            module = module._apply(
                lambda t: (
                    t.to(dtype)
                    if t.is_floating_point() and torch.finfo(t.dtype).bits < smaller
                    else t
                )
            )
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
    module._tensors.refresh_copy()


def _slots(module: nn.Module, kind: str) -> dict[str, tuple[dict, str]]:
    """Where every parameter or buffer of `module` hangs, ties repeated, by qualified name."""
    return {
        f"{prefix}.{key}" if prefix else key: (getattr(owner, kind), key)
        for prefix, owner in module.named_modules(remove_duplicate=False)
        for key, value in getattr(owner, kind).items()
        if value is not None
    }


class _Correspondence:
    """Which tensor of the momentum and of the copy belongs to which of the model.

    Found once; a tensor that was replaced since (by `.to()`, or by assignment) is found again.
    """

    def __init__(self, model: nn.Module, momentum: nn.Module, copy: nn.Module | None):
        self._modules = [module for module in (model, momentum, copy) if module is not None]
        self._find()

    def _find(self) -> None:
        # Kept only when all of it is found: after a refusal the next call must look again.
        found, parameters = [], 0
        for kind in ("_parameters", "_buffers"):
            slots = [_slots(module, kind) for module in self._modules]
            for where, other in zip(("module", "copy"), slots[1:], strict=False):
                if other.keys() != slots[0].keys():
                    names = sorted(other.keys() ^ slots[0].keys())
                    raise ValueError(
                        f"{where}: expected the model's {kind[1:]}; they differ in {names[:5]}"
                    )
            found += [(name, [each[name] for each in slots]) for name in slots[0]]
            if kind == "_parameters":
                parameters = len(found)
        self._slots, self._parameters = found, parameters
        self._rows = self._present()
        self._sort()

    def _present(self) -> list[list[torch.Tensor]]:
        return [[owner[key] for owner, key in places] for _, places in self._slots]

    def _sort(self) -> None:
        parameters, floats, others, seen = [], [], [], set()
        for at, ((name, _), row) in enumerate(zip(self._slots, self._rows, strict=True)):
            if id(row[1]) in seen:  # tied
                continue
            seen.add(id(row[1]))
            kind = parameters if at < self._parameters else floats
            (kind if row[0].is_floating_point() else others).append((name, row))
        self._groups = parameters, floats, others

    def _current(self):
        owners = (owner.get(key) for _, places in self._slots for owner, key in places)
        known = (t for row in self._rows for t in row)
        if not all(map(operator.is_, owners, known)):
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

    @torch.no_grad()
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
                _run(rows, part_decay, part_check)
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
            elsewhere = row[0].is_floating_point() and t.device != row[0].device
            if t.shape != row[0].shape or elsewhere:
                raise ValueError(
                    f"{name}: expected the same shape and device in the model and its {where}, "
                    f"got {tuple(row[0].shape)} on {row[0].device} and {tuple(t.shape)} on "
                    f"{t.device}; nothing was written"
                )


def _run(named_rows, decay, check_finite) -> None:
    """Moves the rows by one call of `ema`; without a decay copies them, whatever their dtype."""
    if decay is None:
        for _, row in named_rows:
            for ours in row[1:]:
                ours.copy_(row[0])
        return
    columns = list(zip(*(row for _, row in named_rows), strict=True)) if named_rows else []
    if not columns:
        return
    source, momentum, copies = (*columns, None)[:3]
    found = ema(momentum, source, decay, copies, check_finite=check_finite)
    if check_finite and (last := found.item()) >= 0:
        raise FloatingPointError(
            f"{named_rows[last][0]}: expected finite values; nothing was written to the momentum"
        )
