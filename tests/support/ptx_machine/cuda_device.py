"""A GPU for the operators of csrc/cuda that is not there: their launches run as PTX.

`CudaDevice` calls the operators of `cuda_library` and runs what they launch on the machine, with
the launch's own grid, block, shared memory and arguments. The kernels may touch the tensors of the
call and the memory that the host code makes; of the latter only what has been written is read.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from . import comparison, cuda_library, parser
from .findings import Findings, require_none
from .memory import GlobalMemory
from .observer import Observer
from .program import Program
from .schedule import Schedule


@dataclass
class Storage:
    """The memory of a tensor. written [bytes] marks what has a value; None: all of it."""

    name: str
    alive: StorageWeakRef
    start: int
    size: int
    written: np.ndarray | None


@dataclass
class CudaDevice:
    """`CudaDevice(90).call("ema_update", ...)`: an operator on CPU tensors, its kernels as PTX.

    execute, schedules, hazards and observers: as those of `virtual_gpu.VirtualGPU`. launches: the
    kernels so far, by name, grid and observers. findings: of the last call. change: given the text
    of a module, returns the one to run.
    """

    target: int
    execute: bool = True
    schedules: tuple[Schedule, ...] = (Schedule(),)
    hazards: bool = True
    observers: Callable[[], tuple[Observer, ...]] = tuple
    change: Callable[[str], str] | None = None
    launches: list[tuple[str, tuple[int, int, int], tuple[Observer, ...]]] = field(
        default_factory=list
    )
    findings: Findings = field(default_factory=Findings)

    def call(self, name: str, *arguments):
        """torch.ops.fastvlp_ptx.<name>(*arguments). Raises HazardError for what is found."""
        self.findings = Findings()
        given = [
            _storage(f"argument {i}", tensor)
            for i, argument in enumerate(arguments)
            for tensor in _tensors(argument)
        ]

        def launched(launch: cuda_library.Launch) -> None:
            self.launch(launch, given)

        result = cuda_library.load().call(name, arguments, launched, _host_memory.filled)
        require_none(self.findings)
        return result

    def launch(self, launch: cuda_library.Launch, given: Sequence[Storage]) -> None:
        """What a kernel launch of the host code does, with the memory of the call's tensors."""
        observers = self.observers() if self.execute else ()
        self.launches.append((launch.kernel, launch.grid, observers))
        if self.execute:
            self._run(launch, given, observers)

    def _run(self, launch: cuda_library.Launch, given, observers: tuple[Observer, ...]) -> None:
        program = program_of(self.target, launch.kernel, self.change)
        values = [
            ctypes.string_at(at, parameter.bytes)
            for at, parameter in zip(launch.arguments, program.kernel.parameters, strict=False)
        ]
        memory = GlobalMemory()
        for storage in (*given, *_host_memory.live()):
            if storage.size:
                found = memory.register(storage.name, storage.start, storage.size)
                found.written = storage.written
        comparison.launch(
            program, launch.grid, program.pack(values), memory, self.findings, self.schedules,
            self.hazards, observers, block=launch.block, dynamic_shared=launch.shared_bytes,
        )  # fmt: skip


class _HostMemory:
    """What the host code of the operators has made and not freed. Some of it, the tables of
    tensors, outlives a call, and is the same for every device."""

    def __init__(self) -> None:
        self._storages: list[Storage] = []

    def filled(self, tensor: torch.Tensor, written: bool) -> None:
        storage = _storage("scratch memory", tensor)
        if not written:
            storage.written = np.zeros(storage.size, bool)
            self._storages.append(storage)
        for known in self._storages:
            if written and known.start == storage.start and not known.alive.expired():
                known.written = None

    def live(self) -> list[Storage]:
        self._storages = [storage for storage in self._storages if not storage.alive.expired()]
        return self._storages


_host_memory = _HostMemory()


def _tensors(argument) -> list[torch.Tensor]:
    if isinstance(argument, torch.Tensor):
        return [argument]
    return [t for t in argument if isinstance(t, torch.Tensor)] if _is_list(argument) else []


def _is_list(argument) -> bool:
    return isinstance(argument, list | tuple)


def _storage(name: str, tensor: torch.Tensor) -> Storage:
    held = tensor.untyped_storage()
    return Storage(name, StorageWeakRef(held), held.data_ptr(), held.nbytes(), None)


@cache
def _kernels(target: int, change: Callable[[str], str] | None) -> dict[str, parser.Kernel]:
    kernels = {}
    for text in cuda_library.load().ptx[target]:
        kernels |= parser.parse(change(text) if change else text).kernels
    return kernels


@cache
def program_of(target: int, kernel: str, change: Callable[[str], str] | None = None) -> Program:
    """A kernel of csrc/cuda by its mangled name, decoded once in the life of the process."""
    return Program(_kernels(target, change)[kernel])
