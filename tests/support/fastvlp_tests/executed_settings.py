"""Which settings of which kernels passed as PTX, kept between test runs.

A run over every tile takes long, so it may be made in parts, at the same time or one after the
other. What passed counts until the operator's kernels, what all kernels share, the PTX machine or
Triton change.
"""

import functools
import hashlib
import importlib.metadata
import os
from collections.abc import Iterable
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[3]


class Notes:
    """Lines of text by operator in a folder, each process with a file of its own."""

    def __init__(self, folder: Path):
        self._folder = folder

    def add(self, op: str, settings: Iterable[str]) -> None:
        with open(self._folder / f"{op}-{fingerprint(op)}-{os.getpid()}.txt", "a") as file:
            file.writelines(f"{setting}\n" for setting in settings)

    def read(self, ops: Iterable[str]) -> set[str]:
        """The settings of these operators that passed with the present sources."""
        return {
            line
            for op in ops
            for file in self._folder.glob(f"{op}-{fingerprint(op)}-*.txt")
            for line in file.read_text().splitlines()
        }


def operators() -> list[str]:
    """Those with Triton kernels."""
    folders = (_ROOT / "kernels").iterdir()
    return sorted(path.name for path in folders if path.is_dir() and path.name[0] not in "._")


@functools.cache
def fingerprint(op: str) -> str:
    digest = hashlib.sha256(importlib.metadata.version("triton").encode())
    for folder in (f"kernels/{op}", "kernels/_core", "tests/support/ptx_machine"):
        for path in sorted((_ROOT / folder).rglob("*.py")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]
