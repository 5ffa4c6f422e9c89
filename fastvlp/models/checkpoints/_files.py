"""State dicts from files, without running code that a file may hold."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from fastvlp.models.files import damaged, read_json, read_safetensors

from ._torchscript import is_torchscript, read_torchscript

# Where trainers put the weights among optimiser states and counters.
CONTAINERS = ("state_dict", "model", "module", "state_dict_ema", "model_state_dict")
# What wrappers (DistributedDataParallel, torch.compile, Lightning) put before every name.
WRAPPERS = ("module.", "_orig_mod.", "model.")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
NAMES = (
    "model.safetensors",
    "open_clip_model.safetensors",
    *INDEXES,
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)
# By what files begin that are mistaken for weights.
MISTAKEN = {
    b"version https://git-lfs": "a pointer of Git LFS in place of the file; run git lfs pull",
    b"<": "a web page; fetch the file itself, on a model hub by its download link",
    b"PAR1": "a Parquet file of data; a checkpoint ends in .safetensors, .bin, .pt or .pth",
    b"\x89HDF": "an HDF5 file, as of Keras; convert it with the library that wrote it",
    b"\x93NUMPY": "a NumPy array; expected a state dict saved by PyTorch",
    b"GGUF": "a GGUF file; take the .safetensors file of the same model",
    b"\x1f\x8b": "compressed by gzip; unpack it",
    b"{": "a JSON file; expected the weights beside it",
}


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, by name, on the CPU.

    Args:
        path: a .safetensors file (preferred), a file of ``torch.save`` (read with
            ``weights_only=True``), a TorchScript archive such as OpenAI's CLIP files (read as data,
            its code does not run), or a folder of a model hub, sharded or not. Containers
            ("state_dict", "model") are opened and the prefixes of DistributedDataParallel,
            torch.compile and Lightning ("model.") removed, where every name has them.

    Raises:
        FileNotFoundError: no such file, or no weights in the folder.
        ValueError: the file holds no state dict, or more than tensors and plain values, or is
            damaged.
    """
    return unwrap(read_checkpoint(path), path)


def read_checkpoint(path: str | Path) -> dict:
    """All that a checkpoint holds, the containers around its state dict included.

    Raises:
        FileNotFoundError, ValueError: as `read_state_dict`.
    """
    path = Path(path)
    if path.is_dir():
        found = next((path / name for name in NAMES if (path / name).exists()), None)
        if found is None:
            raise FileNotFoundError(f"path: expected one of {NAMES} in {path}")
        path = found
    if not path.exists():
        raise FileNotFoundError(f"path: {path} does not exist")
    if path.name in INDEXES:
        return {k: v for shard in _shards(path) for k, v in read_state_dict(shard).items()}
    loaded = _read(path)
    if not isinstance(loaded, dict):
        raise ValueError(f"path: expected a state dict in {path}, got {type(loaded).__name__}")
    return loaded


def _shards(index: Path) -> list[Path]:
    described = read_json(index)
    weights = described.get("weight_map")
    names = weights.values() if isinstance(weights, dict) else [None]
    if not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise ValueError(
            f"path: expected a weight_map of files beside it in {index}; fetch it again"
        )
    return [index.with_name(name) for name in sorted(set(names))]


def _read(path: Path):
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise ValueError(f"path: {path} is empty; the download or the copy failed, fetch it again")
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size:
        return read_safetensors(path)  # which begins with the length of its header
    for beginning, what in MISTAKEN.items():
        if start.lstrip().startswith(beginning):
            raise ValueError(f"path: {path} is {what}")
    if path.suffix == ".safetensors":
        raise damaged(path, "it does not begin as a .safetensors file")
    if not start.startswith(b"PK"):
        return _read_pickle(path)
    try:
        with zipfile.ZipFile(path) as archive:
            if is_torchscript(archive):
                return read_torchscript(archive, path)
            if not any(name.endswith("/data.pkl") for name in archive.namelist()):
                raise ValueError(
                    f"path: {path} is a zip file with no weights of PyTorch, but "
                    f"{archive.namelist()[:3]}; unpack it"
                )
    except zipfile.BadZipFile as error:
        raise damaged(path, error) from error
    return _read_pickle(path, mmap=True)


def _read_pickle(path: Path, **options):
    try:
        return torch.load(path, map_location="cpu", weights_only=True, **options)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # what is no pickle makes torch raise nearly anything
        found = re.search(r"GLOBAL ([\w.]+)|class (?:__main__\.)?([\w.]+)", str(error))
        if found is None:
            raise damaged(path, error) from error
        raise ValueError(
            f"path: {path} cannot be read as plain weights: it holds {found[1] or found[2]}, and "
            "to make such an object can run code of whoever wrote the file. Where the file was "
            "written, save the weights alone: torch.save(model.state_dict(), path)"
        ) from None


def unwrap(loaded, path: str | Path = "checkpoint") -> dict[str, Tensor]:
    """The state dict inside of what a checkpoint file holds.

    Raises:
        ValueError: there is none.
    """
    opened: list[dict] = []
    while isinstance(loaded, dict):
        inner = next((c for c in CONTAINERS if isinstance(loaded.get(c), dict)), None)
        if inner is None:
            break
        opened.append(loaded)
        loaded = loaded[inner]
        if any(loaded is outer for outer in opened):
            raise ValueError(f"path: expected a state dict in {path}, got one that holds itself")
    if not isinstance(loaded, dict):
        raise ValueError(f"path: expected a state dict in {path}, got {type(loaded).__name__}")
    state = {k: v for k, v in loaded.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if not state:
        raise ValueError(
            f"path: expected a state dict in {path}, got no tensors but {list(loaded)[:5]}"
        )
    while (prefix := _wrapper(state)) is not None:
        state = {k.removeprefix(prefix): v for k, v in state.items()}
    return state


def _wrapper(state: dict[str, Tensor]) -> str | None:
    """The prefix of a wrapper that stands before every name."""
    return next((p for p in WRAPPERS if all(k.startswith(p) for k in state)), None)
