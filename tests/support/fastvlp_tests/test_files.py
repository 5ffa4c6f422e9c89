"""Test modules whose checks other tests run too, on another device or with other settings."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

TESTS = Path(__file__).parents[2]


def load(path: str) -> ModuleType:
    """The module of a file of tests/, under the name that pytest gives it."""
    file = TESTS / path
    name = ".".join(file.relative_to(TESTS.parent).with_suffix("").parts)
    if name not in sys.modules:
        specs = (finder.find_spec(name, [str(file.parent)]) for finder in sys.meta_path)
        spec = next(spec for spec in specs if spec is not None)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
