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


def matching_slots(modules: list[nn.Module], kind: str) -> list[dict[str, tuple[dict, str]]]:
    """Where every tensor of `kind` ("_parameters", "_buffers") hangs in each module, by name.

    Ties are repeated. Buffers that no state_dict has, which modules make when they need them, are
    left out where not all modules have them.

    Raises:
        ValueError: the other modules, a momentum module and its copy, lack a name of the first.
    """
    slots = [_slots(module, kind) for module in modules]
    if kind == "_buffers":
        made = set().union(*map(_made_when_needed, modules))
        lone = {name for name in made if not all(name in each for each in slots)}
        slots = [{n: slot for n, slot in each.items() if n not in lone} for each in slots]
    for where, other in zip(("module", "copy"), slots[1:], strict=False):
        if other.keys() != slots[0].keys():
            names = sorted(other.keys() ^ slots[0].keys())
            raise ValueError(
                f"{where}: expected the model's {kind[1:]}; they differ in {names[:5]}"
            )
    return slots


def _slots(module: nn.Module, kind: str) -> dict[str, tuple[dict, str]]:
    return {
        plain_name(prefix, key): (getattr(owner, kind), key)
        for prefix, owner in module.named_modules(remove_duplicate=False)
        for key, value in getattr(owner, kind).items()
        if value is not None
    }


def _made_when_needed(module: nn.Module) -> set[str]:
    return {
        plain_name(prefix, key)
        for prefix, owner in module.named_modules(remove_duplicate=False)
        for key in owner._non_persistent_buffers_set
    }


def differences(model: nn.Module, other: nn.Module, where: str) -> set[str]:
    """What each submodule that is not of the same type in both is in each of them.

    `where` says what the other module is to the model, for people.
    """
    types = [
        {plain_name(name): type(each).__name__ for name, each in m.named_modules()}
        for m in (model, other)
    ]
    return {
        f"{name or 'the model'} is {types[0].get(name, 'absent')} in the model and "
        f"{types[1].get(name, 'absent')} in its {where}"
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
