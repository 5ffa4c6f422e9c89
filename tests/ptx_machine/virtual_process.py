"""The calls that a test hands to a child process in which Triton compiles.

This module is imported by the test process too, so Triton is only imported once a call arrives.
"""

import importlib


def run(capability: int, options: dict, module: str, function: str, *args, **kwargs):
    """fastvlp.kernels.<module>.<function>(*args, **kwargs) on a virtual GPU."""
    from .virtual_gpu import VirtualGPU

    with VirtualGPU(capability, **options):
        target = importlib.import_module(f"fastvlp.kernels.{module}")
        return getattr(target, function)(*args, **kwargs)


def call(module: str, function: str, *args):
    """<module>.<function>(*args), which makes a virtual GPU itself."""
    return getattr(importlib.import_module(module), function)(*args)


def count(capability: int, module: str, function: str, *args, **kwargs):
    """[(kernel, blocks, executed instructions by opcode)] of the launches of `run`."""
    from .counts import Counts
    from .virtual_gpu import VirtualGPU

    with VirtualGPU(capability, observers=lambda: (Counts(),)) as gpu:
        getattr(importlib.import_module(f"fastvlp.kernels.{module}"), function)(*args, **kwargs)
    return [
        (each.kernel, each.grid[0] * each.grid[1] * each.grid[2], each.observers[0].instructions)
        for each in gpu.launches
    ]
