"""How modules are built, and whether that has changed: what a momentum copy of one depends on."""

import operator
from collections.abc import Iterable
from itertools import chain

from torch import nn

# Submodules in which wrappers (torch.compile, activation checkpointing) keep what they wrap, which
# computes the same: names pass over them.
TRANSPARENT = ("_orig_mod", "_checkpoint_wrapped_module")


def plain_name(*parts: str) -> str:
    """The dotted name without the submodules of wrappers."""
    return ".".join(p for p in ".".join(parts).split(".") if p and p not in TRANSPARENT)


def tensor_slots(module: nn.Module, kind: str) -> dict[str, tuple[dict, str]]:
    """Where every tensor of `kind` ("_parameters", "_buffers") hangs, ties repeated, by name."""
    return {
        plain_name(prefix, key): (getattr(owner, kind), key)
        for prefix, owner in module.named_modules(remove_duplicate=False)
        for key, value in getattr(owner, kind).items()
        if value is not None
    }


def differences(model: nn.Module, copy: nn.Module) -> dict[str, str]:
    """For the name of each submodule that is not of the same type in both, what it is in each."""
    types = [
        {plain_name(name): type(each).__name__ for name, each in m.named_modules()}
        for m in (model, copy)
    ]
    return {
        name: f"{name or 'the model'} is {types[0].get(name, 'absent')} in the model and "
        f"{types[1].get(name, 'absent')} in its momentum"
        for name in dict.fromkeys(chain(*types))
        if types[0].get(name) != types[1].get(name)
    }


class Snapshot:
    """The submodules, parameters and buffers of some modules, to see at small cost whether one of
    them was added, removed or replaced since."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._owners = [
            kept
            for module in modules
            for each in module.modules()
            for kept in (each._modules, each._parameters, each._buffers)
        ]
        self._sizes = list(map(len, self._owners))
        self._filled = [owner for owner in self._owners if owner]
        self._held = self._present()

    def _present(self) -> list:
        return list(chain.from_iterable(map(operator.methodcaller("values"), self._filled)))

    def holds(self) -> bool:
        """Whether everything is as it was."""
        if list(map(len, self._owners)) != self._sizes:
            return False
        return all(map(operator.is_, self._present(), self._held))
