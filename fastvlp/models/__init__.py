"""Thin models on top of the kernels: `albef`, `clip`, `vilt`. `save` and `load` serve all of them.

from fastvlp.models import clip
"""

from importlib import import_module

from .base import load, save

_MODELS = ("albef", "clip", "vilt")

__all__ = ["load", "save", *_MODELS]


def __getattr__(name: str):
    if name in _MODELS:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
