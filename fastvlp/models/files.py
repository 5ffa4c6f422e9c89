"""Files of models, read so that what is wrong with one is said in a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: it holds none; the message names the file.
    """
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise damaged(file, error) from error
    if not isinstance(described, dict):
        raise ValueError(f"path: expected an object in {file}, got {type(described).__name__}")
    return described


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, on the CPU.

    Raises:
        ValueError: it is damaged; the message names the file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except SafetensorError as error:
        raise damaged(file, error) from error


def damaged(file: Path, error: Exception | str) -> ValueError:
    """The error for a file that cannot be read."""
    # torch's own words come last, after advice to read the file unsafely.
    reason = str(error).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0][:160]
    return ValueError(
        f"path: {file} is of another format, or is damaged or cut short "
        f"({reason or type(error).__name__}); compare its size with the original's and fetch it "
        "again"
    )
