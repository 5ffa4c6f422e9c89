"""The files of a checkpoint: compared with their checksums, and read without running code.

`checksums.json` in a checkpoint's folder has the size and the CRC-32 of every other file there.
They are taken in the background when the checkpoint is written and compared before it is used;
both read each file once, at some 2 GB/s on one CPU core.

torch.distributed.checkpoint keeps its description of a checkpoint, `.metadata`, and values that are
no tensors as pickles, which could run any code. Here a pickle may name the classes of that
description and what `torch.load(weights_only=True)` allows; anything else is refused by its name.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from fastvlp.data.shards.write import atomic_file

_CHECKSUMS = "checksums.json"
_NAME = re.compile(r"step-(\d{8,})")
_BLOCK = 1 << 20

_DESCRIPTION = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(k for k, v in vars(torch).items() if isinstance(v, torch.dtype))},
    "pathlib": {"PosixPath", "WindowsPath"},
    # Where they are defined since Python 3.13.
    "pathlib._local": {"PosixPath", "WindowsPath"},
}  # fmt: skip


class RefusedError(ValueError):
    """A checkpoint names what is no part of one, and was not read further."""


def steps(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, the newest last."""
    found = {path: _NAME.fullmatch(path.name) for path in folder.iterdir()}
    return sorted((p for p, match in found.items() if match), key=step_of)


def step_of(path: Path) -> int:
    """The step after which a checkpoint was taken."""
    return int(path.name.removeprefix("step-"))


def write_checksums(folder: Path) -> None:
    """Writes `checksums.json` for the files in a checkpoint's folder."""
    found = {path.name: _checksum(path) for path in sorted(folder.iterdir())}
    with atomic_file(folder / _CHECKSUMS) as file:
        file.write(json.dumps(found, indent=2).encode())


def damage(folder: Path, rank: int = 0, world_size: int = 1) -> str | None:
    """Which file is not what its checksum says, or None; each rank compares its share of them.

    Without checksums, as older versions wrote checkpoints, nothing is compared.
    """
    try:
        wanted = json.loads((folder / _CHECKSUMS).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        return f"{_CHECKSUMS}: {error}"
    for name in sorted(wanted)[rank::world_size]:
        try:
            found = _checksum(folder / name)
        except OSError as error:
            return f"{name}: {error.strerror}"
        if found != wanted[name]:
            return f"{name}: expected {_described(wanted[name])}, got {_described(found)}"
    return None


def unreadable(folder: Path) -> str | None:
    """Why the description of a checkpoint cannot be read, or None.

    Raises:
        RefusedError: it names what is no part of a description.
    """
    try:
        description(folder)
    except RefusedError:
        raise
    except Exception as error:  # a damaged pickle makes Python raise nearly anything
        return f".metadata: {error!r}"
    return None


def description(folder: Path) -> Metadata:
    """What a checkpoint holds.

    Raises:
        RefusedError: it names what is no part of a description.
    """
    return _Reader(folder).read_metadata()


def load(state: dict[str, Any], folder: Path, group: dist.ProcessGroup | None) -> None:
    """Reads a checkpoint into the tensors of `state`, on all ranks of the group together.

    Raises:
        RefusedError: the checkpoint holds other objects than tensors and plain values.
    """
    alone = {"no_dist": True} if group is None else {"process_group": group}
    try:
        with warnings.catch_warnings():
            # It says that there is one process only, which is known.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")
            dcp.load(state, storage_reader=_Reader(folder), planner=_Planner(), **alone)
    except dcp.CheckpointException as error:
        for failure, _ in error.failures.values():
            if isinstance(failure, RefusedError):
                raise failure from None
        raise


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The model in a checkpoint as a run evaluates it: the moving average, or else the weights.

    Raises:
        RefusedError: as `load` does.
    """
    stored = description(folder).state_dict_metadata
    average = "ema.module."
    prefix = average if any(name.startswith(average) for name in stored) else "model."
    state = {
        name: torch.empty(about.size, dtype=about.properties.dtype)
        for name, about in stored.items()
        if name.startswith(prefix) and isinstance(about, TensorStorageMetadata)
    }
    load(state, folder, None)
    return {name.removeprefix(prefix): value for name, value in state.items()}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.IOBase, path: Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if name not in _DESCRIPTION.get(module, ()):
            raise _refused(self._path, f"{module}.{name}")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self._get_metadata_path(kwargs.get("rank")))
        with open(path, "rb") as file:
            found = _Unpickler(file, path).load()
        if not isinstance(found, Metadata):
            raise _refused(path, f"a {type(found).__name__} in place of a description")
        for place in (found.storage_data or {}).values():
            if Path(place.relative_path).name != place.relative_path:
                raise _refused(path, f"the file {place.relative_path!r}")
        return found


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        # torch's own code unpickles without limits; this pass lets harmless content through only.
        try:
            torch.load(value, weights_only=True)
        except pickle.UnpicklingError as error:
            named = re.search(r"GLOBAL (\S+)", str(error))
            what = named[1] if named else "what is no plain value"
            raise _refused(Path(read_item.storage_index.fqn), what) from None
        value.seek(0)
        super().load_bytes(read_item, value)


def _refused(path: Path, what: str) -> RefusedError:
    return RefusedError(
        f"checkpoint: expected tensors and plain values, got {what} in {path}, which was not "
        f"loaded because it could run code; go on only from folders that `fastvlp train` wrote"
    )


def _checksum(path: Path) -> list[int]:
    size = crc = 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def _described(checksum: Sequence[int]) -> str:
    return f"{checksum[0]} bytes with the checksum {checksum[1]:08x}"
