"""Sizes of a model to train: of a name, with those of a file in their place."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

from fastvlp.models import base
from fastvlp.train.config import read_yaml

Config = TypeVar("Config")
# What the tokenizer says.
_VOCABULARY = "vocab_size"


def with_file(sizes: Config, file: Path | None) -> Config:
    """The sizes with those that a YAML file names replaced.

    Args:
        sizes: a model's configuration, a dataclass such as `ClipConfig`.
        file: `name: value` lines; a list stands for a tuple. None changes nothing.

    Raises:
        OSError: the file cannot be read.
        ValueError: a name is none of the sizes, the nearest of which is suggested; or a value does
            not fit; the message names the file.
    """
    if file is None:
        return sizes
    known = [field.name for field in dataclasses.fields(sizes) if field.name != _VOCABULARY]
    values: dict[str, Any] = {}
    for name, value in read_yaml(file).items():
        if name == _VOCABULARY:
            raise ValueError(
                f"{file}: expected no vocab_size, which is the tokenizer's (--tokenizer); "
                f"got {value!r}"
            )
        if name not in known:
            raise base.unknown_name(str(file), name, known)
        values[name] = tuple(value) if isinstance(value, list) else value
    try:
        return dataclasses.replace(sizes, **values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error
