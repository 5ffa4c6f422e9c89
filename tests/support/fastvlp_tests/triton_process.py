"""Child processes for Triton: interpreting and compiling exclude one another in one process.

Triton reads TRITON_INTERPRET when it is imported and when a kernel is defined, so the test process
itself keeps out of it and hands calls to a child that is in the right mode from its first import.
"""

import importlib
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from fastvlp_tests import quick_interpreter, seeds


def start(interpret: bool, workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_prepare, initargs=(interpret,)
    )


def compilers() -> int:
    """Processes that compile at once: two, which pytest-xdist's processes share."""
    return max(1, 2 // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)))


def _prepare(interpret: bool) -> None:
    if "triton" in sys.modules:
        raise RuntimeError("triton was imported before the mode of this process was set")
    seeds.inherit()
    os.environ["TRITON_INTERPRET"] = "1" if interpret else "0"
    torch.set_num_threads(1)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    if interpret:
        quick_interpreter.quicken()


def call(module: str, function: str, *args, **kwargs):
    """fastvlp.kernels.<module>.<function>(*args, **kwargs)."""
    return getattr(importlib.import_module(f"fastvlp.kernels.{module}"), function)(*args, **kwargs)


def call_with(overrides: dict[str, object], module: str, function: str, *args, **kwargs):
    """`call` while attributes of the module have other values."""
    target = importlib.import_module(f"fastvlp.kernels.{module}")
    before = {name: getattr(target, name) for name in overrides}
    try:
        for name, value in overrides.items():
            setattr(target, name, value)
        return getattr(target, function)(*args, **kwargs)
    finally:
        for name, value in before.items():
            setattr(target, name, value)


def compile_by_index(index: int):
    """The inspected result of the index-th ahead-of-time case."""
    from fastvlp.kernels._core import aot

    return aot.compile_case(aot.all_cases()[index])


def kernel_names() -> set[str]:
    """Of all kernels that are compiled ahead of time."""
    from fastvlp.kernels._core import aot

    return {case.kernel.__name__ for case in aot.all_cases()}


def ptx_of(name: str, capability: int) -> str:
    """The PTX of the ahead-of-time case of this name."""
    from fastvlp.kernels._core import aot

    (case,) = (c for c in aot.all_cases() if (c.name, c.capability) == (name, capability))
    return aot.binary_of(case).asm["ptx"]


def compile_launches(call: str, sizes: str):
    """See `specialised_launches`, which only a child process that compiles can import in full."""
    from fastvlp_tests import specialised_launches

    return specialised_launches.compile_launches(call, sizes)
