"""State dicts from files, without running code that a file may hold."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

# Where trainers put the weights among optimiser states and counters.
CONTAINERS = ("state_dict", "model", "module", "state_dict_ema")
# What wrappers put before every name.
WRAPPERS = ("module.", "_orig_mod.")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
NAMES = ("model.safetensors", "open_clip_model.safetensors", *INDEXES, "pytorch_model.bin")


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, by name, on the CPU.

    Args:
        path: a .safetensors file (preferred), a file of ``torch.save`` (read with
            ``weights_only=True``), a TorchScript archive such as OpenAI's CLIP files, or a folder
            of a model hub, sharded or not. Containers ("state_dict", "model") are opened and the
            prefixes of DistributedDataParallel and torch.compile removed.

    Raises:
        FileNotFoundError: no such file, or no weights in the folder.
        ValueError: the file holds no state dict, or more than tensors and plain values.
    """
    path = Path(path)
    if path.is_dir():
        found = next((path / name for name in NAMES if (path / name).exists()), None)
        if found is None:
            raise FileNotFoundError(f"path: expected one of {NAMES} in {path}")
        path = found
    if path.name in INDEXES:
        shards = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        return {k: v for shard in shards for k, v in read_state_dict(path.with_name(shard)).items()}
    if not path.exists():
        raise FileNotFoundError(f"path: {path} does not exist")
    return unwrap(_read(path), path)


def _read(path: Path):
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "TorchScript" in str(error) or "constants.pkl" in str(error):
            return torch.jit.load(path, map_location="cpu").state_dict()
        if "mmap" in str(error):  # the format before torch 1.6
            return torch.load(path, map_location="cpu", weights_only=True)
        raise
    except Exception as error:
        raise ValueError(
            f"path: {path} cannot be read as plain weights ({error}). If you trust the file, load "
            "it with torch.load(weights_only=False), save its state dict as .safetensors and use "
            "that"
        ) from error


def unwrap(loaded, path: str | Path = "checkpoint") -> dict[str, Tensor]:
    """The state dict inside of what a checkpoint file holds."""
    while isinstance(loaded, dict):
        inner = next((c for c in CONTAINERS if isinstance(loaded.get(c), dict)), None)
        if inner is None:
            break
        loaded = loaded[inner]
    if not isinstance(loaded, dict) or not any(isinstance(v, Tensor) for v in loaded.values()):
        raise ValueError(f"path: expected a state dict in {path}, got {type(loaded).__name__}")
    state = {k: v for k, v in loaded.items() if isinstance(v, Tensor)}
    for prefix in WRAPPERS:
        if all(k.startswith(prefix) for k in state):
            state = {k.removeprefix(prefix): v for k, v in state.items()}
    return state
