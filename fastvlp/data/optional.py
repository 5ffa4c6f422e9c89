"""Optional dependencies, imported where they are used, with an error that says how to get them."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, extra: str = "train") -> ModuleType:
    """Import and return ``module``.

    Raises:
        ImportError: ``module`` is not installed; the message names the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module!r} is needed here but cannot be imported ({error}); "
            f'install it with: pip install -e ".[{extra}]"'
        ) from error
