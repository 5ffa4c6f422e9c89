"""The calls that a test hands to a child process in which Triton compiles.

This module is imported by the test process too, so Triton is only imported once a call arrives.
"""

import importlib


def run(capability: int, options: dict, module: str, function: str, *args, **kwargs):
    """fastvlp.kernels.<module>.<function>(*args, **kwargs) on a virtual GPU.

    A module with a dot in its name is taken as it is.
    """
    from .virtual_gpu import VirtualGPU

    with VirtualGPU(capability, **options):
        return _function(module, function)(*args, **kwargs)


def count(capability: int, options: dict, module: str, function: str, *args, **kwargs):
    """(what `run` gives, [(kernel, grid, Counts), ...]): the launches in their order."""
    from .counts import Counts
    from .virtual_gpu import VirtualGPU

    with VirtualGPU(capability, observers=lambda: (Counts(),), **options) as gpu:
        result = _function(module, function)(*args, **kwargs)
    return result, [(launch.kernel, launch.grid, *launch.observers) for launch in gpu.launches]


def list_settings(capability: int, options: dict, overrides: dict, module: str, *args, **kwargs):
    """(what `run` gives, the settings of its launches, of `ptx_machine.settings.Setting`).

    While it runs, attributes of the module have the values of `overrides`.
    """
    from fastvlp_tests import triton_process

    from . import settings
    from .virtual_gpu import VirtualGPU

    with VirtualGPU(capability, **options) as gpu:
        result = triton_process.call_with(overrides, module, *args, **kwargs)
    return result, [settings.of_launch(capability, launch) for launch in gpu.launches]


def table_settings(capabilities: tuple[int, ...]):
    """The settings of every ahead-of-time case for these compute capabilities."""
    from fastvlp.kernels._core import aot

    from . import settings

    return [settings.of_case(case) for case in aot.all_cases() if case.capability in capabilities]


def call(module: str, function: str, *args):
    """<module>.<function>(*args), which makes a virtual GPU itself."""
    return getattr(importlib.import_module(module), function)(*args)


def _function(module: str, name: str):
    own = module.startswith("ptx_machine.")
    path = module if own else f"fastvlp.kernels.{module}"
    return getattr(importlib.import_module(path), name)
