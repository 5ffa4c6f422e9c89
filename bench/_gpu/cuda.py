"""Records what the operators of csrc/cuda launch: their kernels by nvcc, executed as PTX.

Registers and shared memory are those that ptxas gives a kernel for a compute capability.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import torch
from ptx_machine import cuda_device, cuda_library
from torch.utils._python_dispatch import _disable_current_modes

from _gpu.launches import Binary, Event, KernelLaunch, observers

OPERATORS = ("ema_update", "adamw_ema")
WARP = 32


@contextmanager
def recording(events: list[Event], capability: int, execute: bool) -> Iterator[None]:
    """The multi-tensor operators on CPU tensors are those for a GPU, and append their launches.

    Raises ptx_machine.cuda_library.Missing where csrc/cuda cannot be compiled.
    """
    device = _Recorder(events, capability, execute)
    with torch.library._scoped_library("fastvlp", "IMPL") as library:
        for name in OPERATORS:
            library.impl(name, partial(device.record, name), "CPU", allow_override=True)
        yield


class _Recorder(cuda_device.CudaDevice):
    def __init__(self, events: list[Event], capability: int, execute: bool):
        super().__init__(capability, execute, hazards=False)
        self.events = events

    def record(self, name: str, *arguments) -> None:
        # Torch's operations of the host code fill tables that are kept for the next call.
        with _disable_current_modes():
            self.call(name, *arguments)

    def launch(self, launch, given) -> None:
        registers, stack, shared = resources(self.target, launch.kernel)
        warps = -(-math.prod(launch.block) // WARP)
        binary = Binary(warps, registers, stack, shared + launch.shared_bytes)
        self.observers = partial(observers, self.target, binary)
        super().launch(launch, given)
        moved = {storage.start: storage.size for storage in given}
        name = readable(launch.kernel)
        found = KernelLaunch(name, math.prod(launch.grid), binary, sum(moved.values()))
        if self.execute:
            program = cuda_device.program_of(self.target, launch.kernel)
            found.watched(program, *self.launches[-1][-1])
        self.events.append(found)


def resources(capability: int, kernel: str) -> tuple[int, int, int]:
    """Registers, bytes of stack and of static shared memory of a kernel by its mangled name."""
    (text,) = (t for t in cuda_library.load().ptx[capability] if f".entry {kernel}(" in t)
    return _resources_in(capability, text)[kernel]


@cache
def _resources_in(capability: int, text: str) -> dict[str, tuple[int, int, int]]:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernels.ptx"
        source.write_text(text)
        command = ["nvcc", "--cubin", f"-arch=sm_{capability}", "-Xptxas=-v", str(source)]
        done = subprocess.run(
            [*command, "-o", str(source.with_suffix(".cubin"))],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
    return parse_resources(done.stderr + done.stdout)


def parse_resources(report: str) -> dict[str, tuple[int, int, int]]:
    """The resources by kernel in what ptxas reports with -v."""
    found = {}
    for part in report.split("Compiling entry function '")[1:]:
        name, rest = part.split("'", 1)
        numbers = [
            re.search(pattern, rest)
            for pattern in (
                r"Used (\d+) registers",
                r"(\d+) bytes stack frame",
                r"(\d+) bytes smem",
            )
        ]
        found[name] = tuple(int(number[1]) if number else 0 for number in numbers)
    return found


def readable(mangled: str) -> str:
    """The last part of a mangled name with the numbers that it is made for.

    update_ema<4> of _ZN7fastvlp4cuda..10update_emaILi4EE..
    """
    rest, name = mangled.removeprefix("_ZN"), mangled
    while digits := re.match(r"\d+", rest):
        end = digits.end() + int(digits[0])
        name, rest = rest[digits.end() : end], rest[end:]
    arguments = re.match(r"I((?:Li\d+E)+)E", rest)
    return f"{name}<{', '.join(re.findall(r'[0-9]+', arguments[1]))}>" if arguments else name
