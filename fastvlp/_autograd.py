"""torch.autograd.Function at less cost a call."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch


class Function(torch.autograd.Function):
    """A torch.autograd.Function that knows the signature of its `forward`.

    `apply` binds its arguments to that signature where a class has a `setup_context`. It works the
    signature out in every call, and binds by a general rule: together 70 microseconds, longer than
    all else that it does. Here every argument is given by position, and none is left out.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        found = inspect.signature(cls.forward)
        cls.forward.__signature__ = _Positional(list(found.parameters.values()))


class _Positional(inspect.Signature):
    """A signature that takes a full list of positional arguments as it is."""

    def bind(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != len(self.parameters):
            return super().bind(*args, **kwargs)
        return _Bound(args)


class _Bound:
    kwargs: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, args: tuple[Any, ...]) -> None:
        self.args = args

    def apply_defaults(self) -> None:
        """There is nothing to fill in."""
