"""The operators' implementations in Python: how torch gets them, each with autocast off inside.

An operator decides itself in which dtype it multiplies: autocast around it would round float32
operands of its matmuls, or have them not fit the memory that they are written to.
"""

from collections.abc import Callable
from functools import wraps

import torch

from ..autocast import autocasts

# The operators' names, by the dispatch keys that `implement` has registered them for.
IMPLEMENTED: dict[str, set[str]] = {"CPU": set(), "CUDA": set()}


def implement(operator: str, function: Callable, *devices: str) -> None:
    """Registers `function` for fastvlp::`operator` on "CPU" or "CUDA" tensors, or on both.

    Its first argument is a tensor.
    """
    torch.library.impl(f"fastvlp::{operator}", devices, without_autocast(function))
    for device in devices:
        IMPLEMENTED[device].add(operator)


def without_autocast(function: Callable) -> Callable:
    """`function`, whose first argument is a tensor, with autocast off for the tensor's device."""

    @wraps(function)
    def run(tensor, *arguments, **options):
        if not autocasts(device := tensor.device.type):
            return function(tensor, *arguments, **options)
        with torch.autocast(device, enabled=False):
            return function(tensor, *arguments, **options)

    return run
