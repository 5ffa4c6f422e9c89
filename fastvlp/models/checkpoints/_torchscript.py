"""The tensors of a TorchScript archive, read as data: none of the archive's code runs.

Such an archive is a zip file of `data.pkl`, a pickle of the module and its attributes; `data/0`,
`data/1` and so on, the bytes of the tensors; and TorchScript source, which is left unread. Loaded
by ``torch.jit.load`` it may run that source, by a `__setstate__` for example.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    f"{name}Storage": dtype
    for name, dtype in (
        ("Float", torch.float32),
        ("Double", torch.float64),
        ("Half", torch.float16),
        ("BFloat16", torch.bfloat16),
        ("Long", torch.int64),
        ("Int", torch.int32),
        ("Short", torch.int16),
        ("Char", torch.int8),
        ("Byte", torch.uint8),
        ("Bool", torch.bool),
        ("ComplexFloat", torch.complex64),
        ("ComplexDouble", torch.complex128),
    )
}
# Far beyond any model; modules that contain themselves or one another reach them.
DEEPEST, MOST = 100, 100_000


def is_torchscript(archive: zipfile.ZipFile) -> bool:
    """Whether the zip file is a module of TorchScript, whole or not."""
    return any(re.fullmatch(r"[^/]+/constants\.pkl", name) for name in archive.namelist())


def read_torchscript(archive: zipfile.ZipFile, path: Path) -> dict[str, Tensor]:
    """The tensors among the attributes of the module and its submodules, by qualified name.

    Raises:
        ValueError: the archive holds something else, or is damaged.
    """
    name = next((n for n in archive.namelist() if re.fullmatch(r"[^/]+/data\.pkl", n)), None)
    if name is None:
        raise ValueError(f"path: {path} is a TorchScript archive without data.pkl; fetch it again")
    try:
        content = io.BytesIO(_member(archive, name))
        root = _Unpickler(content, archive, name.removesuffix(".pkl")).load()
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ValueError(
            f"path: {path} is a TorchScript archive that cannot be read as plain weights: "
            f"{str(error)[:200]}"
        ) from error
    return _named_tensors(root, path)


class _Inert:
    """An object of a class that the archive defines: what was stored of it, and no behaviour."""

    def __new__(cls, *_: Any) -> _Inert:
        made = super().__new__(cls)
        made.attributes = {}
        return made

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise ValueError("a module restores itself by a method of its own, which is not run")
        self.attributes = state


def _rebuild_tensor(flat: Tensor, offset: int, size: tuple, stride: tuple, *_: Any) -> Tensor:
    return flat.as_strided(size, stride, offset)


def _first(value: Any, *_: Any) -> Any:
    return value


_ALLOWED = {
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch.device": _Inert,
    "torch.jit._pickle.restore_type_tag": _first,
    **{f"torch.jit._pickle.build_{kind}list": list for kind in ("int", "double", "bool", "tensor")},
}


class _Unpickler(pickle.Unpickler):
    """Makes plain values, tensors and `_Inert` objects, and calls nothing else."""

    def __init__(self, file, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(file)
        self._archive, self._folder = archive, folder
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "__torch__":
            return _Inert
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if f"{module}.{name}" in _ALLOWED:
            return _ALLOWED[f"{module}.{name}"]
        raise ValueError(f"it holds {module}.{name}, which is neither a tensor nor a plain value")

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, name, _, count = pid
        if name not in self._storages:
            # In a bytearray, so that the tensor may be written.
            content = bytearray(_member(self._archive, f"{self._folder}/{name}"))
            empty = torch.empty(0, dtype=torch.uint8)
            self._storages[name] = (
                torch.frombuffer(content, dtype=torch.uint8) if content else empty
            )
        return self._storages[name].view(dtype)[:count]


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed, which PyTorch never does")
    return archive.read(name)


def _named_tensors(root: Any, path: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    pending, seen = [("", root, 0)], 0
    while pending:
        prefix, module, depth = pending.pop()
        seen += 1
        if depth > DEEPEST or seen > MOST:
            raise ValueError(
                f"path: {path} has modules inside of one another without end, or more than {MOST}"
            )
        for name, value in getattr(module, "attributes", {}).items():
            if isinstance(value, Tensor):
                found[f"{prefix}{name}"] = value
            elif isinstance(value, _Inert):
                pending.append((f"{prefix}{name}.", value, depth + 1))
    return found
