"""Triton's interpreter without what takes most of its time.

At every call of a device function, `tl.sum` and `tl.zeros` among them, it looks through the whole
language for what to replace, although all of that stays replaced until the launch ends.
"""

from typing import Any


def quicken() -> None:
    """Has the interpreter replace the language once a launch for each module of functions."""
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    scopes: dict[int, Any] = {}  # of this launch, by the module

    def patch_once(function):
        module = id(function.__globals__)
        if module not in scopes:
            scopes[module] = patch(function)
        return scopes[module]

    def launch_anew(executor, *args, **kwargs):
        scopes.clear()
        return launch(executor, *args, **kwargs)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_anew
