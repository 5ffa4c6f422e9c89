"""A GPU for Triton's launchers that is not there: launches run on CPU tensors, as PTX.

`VirtualGPU` takes the place of Triton's driver. Everything before a launch is the real thing: the
host code of fastvlp.kernels, its choice of tiles for the device, Triton's specialisation of the
arguments, the compiler. What is launched runs on the PTX machine, or, in a dry run, does not run.

Triton has one mode per process, so tests do this in a child process, one for each compute
capability (see `virtual_process`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel

from . import asynchronous, parser
from .comparison import launch
from .findings import Findings, require_none
from .fresh_memory import FreshMemory
from .memory import GlobalMemory
from .observer import Observer
from .program import Program
from .schedule import Schedule


@dataclass(frozen=True)
class Device:
    """What host code asks a device about itself."""

    name: str
    capability: tuple[int, int]
    multi_processor_count: int
    shared_memory: int
    total_memory: int


DEVICES = {
    80: Device("NVIDIA A100-SXM4-80GB", (8, 0), 108, 166_912, 80 << 30),
    90: Device("NVIDIA H200", (9, 0), 132, 232_448, 141 << 30),
}


@dataclass
class Launch:
    """One launch: the compiled kernel (`triton.compiler.CompiledKernel`), its grid, and whoever
    watched its execution."""

    kernel: str
    grid: tuple[int, int, int]
    compiled: object
    observers: tuple[Observer, ...] = ()


@dataclass
class VirtualGPU:
    """`with VirtualGPU(90) as gpu:` what Triton launches meanwhile runs on the PTX machine.

    execute: False for a dry run, which compiles (and fills Triton's cache) but runs nothing.
    schedules: each launch runs under all of them; where the results differ that is a finding, and
    those of the last one stay. hazards: whether to look for hazards. Findings are in `findings`;
    at the end of the block any are an error. multiprocessors: how many the device reports,
    by default those of the real one. observers: called once for each launch, gives further
    observers of its execution under the last schedule.
    """

    capability: int = 90
    execute: bool = True
    schedules: tuple[Schedule, ...] = (Schedule(),)
    hazards: bool = True
    multiprocessors: int | None = None
    observers: Callable[[], tuple[Observer, ...]] = tuple
    launches: list[Launch] = field(default_factory=list)
    findings: Findings = field(default_factory=Findings)

    def __post_init__(self):
        if self.capability not in DEVICES:
            raise ValueError(f"capability must be one of {[*DEVICES]}, got {self.capability}")
        self.device = DEVICES[self.capability]
        self._patches: list = []
        self._fresh = FreshMemory()

    def __enter__(self) -> "VirtualGPU":
        capability = self.device.capability
        multiprocessors = self.multiprocessors or self.device.multi_processor_count
        properties = SimpleNamespace(
            name=self.device.name, major=self.device.capability[0],
            minor=self.device.capability[1], total_memory=self.device.total_memory,
            multi_processor_count=multiprocessors,
        )  # fmt: skip
        self._patches = [
            mock.patch.object(triton.runtime.driver, "_active", _Driver(self)),
            mock.patch.object(CompiledKernel, "_init_handles", lambda compiled: None),
            mock.patch.object(
                CompiledKernel, "run", property(lambda compiled: partial(self.launch, compiled))
            ),
            mock.patch("torch.cuda.get_device_capability", lambda device=None: capability),
            mock.patch("torch.cuda.get_device_properties", lambda device=None: properties),
            mock.patch("fastvlp.kernels._core.support.device_reasons", lambda device: []),
            # What was asked of the device before stays in a cache there.
            mock.patch(
                "fastvlp.kernels._core.launch._multiprocessors", lambda device: multiprocessors
            ),
        ]
        for patch in self._patches:
            patch.start()
        if self.hazards:
            self._fresh.__enter__()
        return self

    def __exit__(self, kind, *exception) -> None:
        if self.hazards:
            self._fresh.__exit__(kind, *exception)
        for patch in reversed(self._patches):
            patch.stop()
        if kind is None:
            require_none(self.findings)

    def launch(self, compiled, x, y, z, stream, function, packed, metadata, enter, leave, *values):
        """What `CompiledKernel.run` does, with its arguments."""
        if compiled.metadata.shared > self.device.shared_memory:
            raise triton.runtime.errors.OutOfResources(
                compiled.metadata.shared, self.device.shared_memory, "shared memory"
            )
        observers = self.observers() if self.execute else ()
        self.launches.append(Launch(compiled.name, (x, y, z), compiled, observers))
        if self.execute:
            self.run(compiled, (x, y, z), values, observers)

    def run(self, compiled, grid, arguments: tuple, observers: tuple[Observer, ...]) -> None:
        program = program_of(compiled.asm["ptx"])
        memory, values = GlobalMemory(), []
        descriptors = iter(getattr(compiled.metadata, "tensordesc_meta", None) or ())
        for (name, kind), value in zip(compiled.src.signature.items(), arguments, strict=True):
            if kind.startswith("tensordesc"):
                values += self._descriptor(memory, name, value, next(descriptors))
            elif kind != "constexpr":
                values.append(self._parameter(memory, name, kind, value))
        # The compiler adds pointers to scratch memory, for the grid and for profiling.
        if compiled.metadata.profile_scratch_size:
            raise NotImplementedError(f"{compiled.name} asks for scratch memory for profiling")
        scratch = _scratch(memory, compiled.metadata, grid)
        left = len(program.kernel.parameters) - len(values)
        values += [scratch.ctypes.data, *[0] * left][:left]
        launch(
            program, grid, program.pack(values), memory, self.findings, self.schedules,
            self.hazards, observers, dynamic_shared=compiled.metadata.shared,
        )  # fmt: skip

    def _parameter(self, memory: GlobalMemory, name: str, kind: str, value):
        """The value of a kernel parameter; a tensor's storage becomes an allocation."""
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            if storage.nbytes():
                found = memory.register(name, storage.data_ptr(), storage.nbytes())
                found.written = self._fresh.written(storage)
            return value.data_ptr()
        if kind.startswith("*"):
            raise TypeError(f"{name}: expected a tensor for {kind}, got {type(value).__name__}")
        if kind.startswith("fp"):
            return float(value)
        return int(value)

    def _descriptor(self, memory: GlobalMemory, name: str, value, meta: dict) -> list:
        """Parameters for a host's tensor descriptor: the tensor map, shape and strides."""
        element = "tf32" if value.round_f32_to_tf32 else asynchronous.ELEMENTS[meta["elem_type"]]
        made = asynchronous.encode_for_triton(
            self._parameter(memory, name, "*", value.base), element, value.base.element_size(),
            meta["swizzle"], meta["block_size"], value.shape, value.strides, value.padding == "nan",
        )  # fmt: skip
        return [made.tobytes(), *value.shape, *value.strides]


@lru_cache(maxsize=256)
def program_of(ptx: str) -> Program:
    """The only kernel of a module, decoded once in the life of the process."""
    (kernel,) = parser.parse(ptx).kernels.values()
    return Program(kernel)


def _scratch(memory: GlobalMemory, metadata, grid: tuple[int, int, int]) -> np.ndarray:
    """Memory that each block of the grid has a part of."""
    size, align = metadata.global_scratch_size * int(np.prod(grid)), metadata.global_scratch_align
    held = np.zeros(size + align, np.uint8)
    start = -held.ctypes.data % align
    scratch = held[start : start + size]
    if size:
        memory.register_array("scratch memory", scratch, written=False)
    return scratch


class _Driver:
    """What Triton's runtime asks of its driver."""

    def __init__(self, gpu: VirtualGPU):
        self.gpu = gpu

    # Triton keeps compiled kernels by device: each capability is a device of its own.
    def get_current_device(self) -> int:
        return self.gpu.capability

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.gpu.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int) -> dict:
        return {"max_shared_mem": self.gpu.device.shared_memory}
