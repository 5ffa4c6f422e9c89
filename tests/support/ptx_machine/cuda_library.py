"""csrc/cuda on CPU tensors: its host code as it is, its kernels as PTX that Python executes.

`load` builds a variant of the CUDA library whose operators take CPU tensors, in the namespace
torch.ops.fastvlp_ptx, and whose CUDA runtime is the stand-in in cuda/runtime.cpp: a launch arrives
in Python with the kernel's name, grid, block and arguments. nvcc compiles the sources once and
leaves the PTX of each target next to the library.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock
from torch.utils._python_dispatch import TorchDispatchMode

HERE = Path(__file__).parent / "cuda"
ROOT = Path(__file__).parents[3]
CSRC = ROOT / "csrc"
TARGETS = (80, 90)
KERNEL_SOURCES = tuple(sorted(path.parent.name for path in (CSRC / "cuda").glob("*/*.cu")))
HOST_SOURCES = (*(f"cuda/{name}/{name}.cpp" for name in KERNEL_SOURCES), "schema.cpp")
_HOST_FLAGS = (
    "-std=c++20", "-O1", "-fPIC", "-DTORCH_TARGET_VERSION=0x020a000000000000",
)  # fmt: skip
_LAUNCHER = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_uint64,
    ctypes.POINTER(ctypes.c_void_p),
)
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

Dim3 = tuple[int, int, int]


class Missing(Exception):
    """What the build needs and this machine lacks."""


@dataclass(frozen=True)
class Launch:
    """One kernel launch. arguments[i] is the address of the i-th argument, valid during it."""

    kernel: str
    grid: Dim3
    block: Dim3
    shared_bytes: int
    arguments: Sequence[int]


class State(ctypes.Structure):
    """What torch and the device tell of themselves, as cuda/runtime.cpp has it."""

    _fields_ = (
        ("torch_device", ctypes.c_int32),
        ("driver_device", ctypes.c_int32),
        ("stream", ctypes.c_int64),
        ("capturing", ctypes.c_int32),
        ("events_reached", ctypes.c_int32),
    )


@dataclass(frozen=True)
class Library:
    """The loaded variant. ptx[target] are the texts of the modules, one per source."""

    handle: ctypes.CDLL
    ptx: dict[int, list[str]]

    @property
    def state(self) -> State:
        """In the library's own memory: what is set here counts from the next call on."""
        self.handle.fastvlp_ptx_state.restype = ctypes.POINTER(State)
        return self.handle.fastvlp_ptx_state().contents

    def call(
        self,
        name: str,
        arguments: Sequence,
        launch: Callable[[Launch], None],
        filled: Callable[[torch.Tensor, bool], None] = lambda tensor, written: None,
    ):
        """torch.ops.fastvlp_ptx.<name>(*arguments).

        launch: gets each kernel launch; what it raises comes out of here. filled(tensor, written):
        gets each tensor that the host code makes (written: false) or copies to (true).
        """
        errors: list[BaseException] = []

        def receive(kernel, grid, block, shared_bytes, values) -> int:
            try:
                sizes = tuple(grid[:3]), tuple(block[:3])
                launch(Launch(kernel.decode(), *sizes, shared_bytes, values))
            except BaseException as error:  # it cannot pass through the C++ code
                errors.append(error)
            return len(errors)

        callback = _LAUNCHER(receive)
        self.handle.fastvlp_ptx_set_launcher(callback)
        try:
            # Past the mode to the operator, whose own calls then come to the mode.
            with _MemoryOfHostCode(filled):
                return getattr(torch.ops.fastvlp_ptx, name).default.redispatch(_CPU, *arguments)
        except RuntimeError:
            if errors:
                raise errors[0] from None
            raise
        finally:
            self.handle.fastvlp_ptx_set_launcher(_LAUNCHER())


class _MemoryOfHostCode(TorchDispatchMode):
    """Sees the tensors that host code makes and fills. Pinned memory, which torch has only with a
    GPU, becomes plain memory."""

    def __init__(self, filled: Callable[[torch.Tensor, bool], None]) -> None:
        super().__init__()
        self._filled = filled

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = {key: value for key, value in (kwargs or {}).items() if key != "pin_memory"}
        made = function(*args, **kwargs)
        name = function.name()
        if name not in ("aten::empty.memory_format", "aten::new_empty", "aten::copy_"):
            raise NotImplementedError(f"the host code of the CUDA operators calls {name}")
        self._filled(made, name == "aten::copy_")
        return made


@cache
def load() -> Library:
    """Builds the library unless it is there. Raises Missing where it cannot be built."""
    folder = _built()
    handle = ctypes.CDLL(str(folder / "library.so"))
    ptx = {
        target: [(folder / f"{name}.{target}.ptx").read_text() for name in KERNEL_SOURCES]
        for target in TARGETS
    }
    return Library(handle, ptx)


def _built() -> Path:
    """The folder of the build, keyed by everything that goes into it."""
    for tool in ("nvcc", "c++"):
        if shutil.which(tool) is None:
            raise Missing(f"{tool} is not on PATH: csrc/cuda cannot be compiled")
    version = subprocess.run(["nvcc", "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(version + torch.__version__.encode())
    inputs = [Path(__file__), *HERE.iterdir(), CSRC / "schema.cpp"]
    for folder in ("cuda", "common"):
        inputs += [path for path in (CSRC / folder).rglob("*") if path.is_file()]
    for path in sorted(inputs):
        digest.update(path.read_bytes())
    folder = ROOT / "build" / "ptx_machine" / digest.hexdigest()[:16]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):  # of several processes one builds it
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=folder.parent) as made:
                _build(Path(made) / "library")
                os.rename(Path(made) / "library", folder)
    return folder


def _build(folder: Path) -> None:
    folder.mkdir()
    objects = [_compile_kernels(name, folder) for name in KERNEL_SOURCES]
    objects += [_compile_host(CSRC / name, folder) for name in HOST_SOURCES]
    runtime = folder / "runtime.o"
    _run(["nvcc", "-std=c++17", "-Xcompiler=-fPIC", "-c", HERE / "runtime.cpp", "-o", runtime])
    # Its own CUDA symbols, not those of a runtime that torch may have loaded.
    _run(
        ["c++", "-shared", "-Wl,-Bsymbolic", "-Wl,--no-undefined", *objects, runtime]
        + [f"-L{_torch_root() / 'lib'}", "-ltorch_cpu", "-lc10", "-o", folder / "library.so"]
    )


def _compile_kernels(name: str, folder: Path) -> Path:
    made = folder / f"{name}.cu.o"
    targets = [f"-gencode=arch=compute_{t},code=compute_{t}" for t in TARGETS]
    with tempfile.TemporaryDirectory(dir=folder) as kept:
        _run(
            ["nvcc", "-std=c++17", "-Xcompiler=-fPIC", *targets, "--keep", "--keep-dir", kept]
            + ["-c", CSRC / "cuda" / name / f"{name}.cu", "-o", made]
        )
        for target in TARGETS:
            text = Path(kept) / f"{name}.compute_{target}.ptx"
            shutil.move(text, folder / f"{name}.{target}.ptx")
    return made


def _compile_host(source: Path, folder: Path) -> Path:
    made = folder / f"{source.name}.o"
    ccache = ["ccache"] if shutil.which("ccache") else []
    headers = ["-isystem", _torch_root() / "include", "-include", HERE / "cpu_tensors.h"]
    _run([*ccache, "c++", *_HOST_FLAGS, *headers, "-c", source, "-o", made])
    return made


def _torch_root() -> Path:
    return Path(torch.__file__).parent


def _run(command: list) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr}")
