"""WebDataset tar shards, written so that a reader never meets half a file.

A shard is a USTAR archive whose members share a key and differ in their extension
(``000123.png``, ``000123.txt``, ``000123.json``). Keys are short: longer member names than USTAR
holds need PAX headers, which some readers of WebDataset shards silently misread.
"""

from __future__ import annotations

import hashlib
import io
import os
import secrets
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fastvlp.data.shards import tar as tar_scan

_TEMPORARY_SUFFIX = ".partial"
_LONGEST_NAME = 100


@dataclass(frozen=True)
class Sample:
    """One sample: its key, and the content of its members by extension (without the dot)."""

    key: str
    members: dict[str, bytes]


@dataclass(frozen=True)
class ShardRecord:
    """What a finished shard must look like: file name, number of samples, size and digest."""

    name: str
    count: int
    bytes: int
    sha256: str

    def matches(self, folder: Path) -> bool:
        """Whether the file in ``folder`` is the one recorded, byte for byte."""
        path = folder / self.name
        try:
            return path.stat().st_size == self.bytes and _sha256(path) == self.sha256
        except OSError:
            return False


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Write a file that appears under its name only when it is whole and on the disk.

    The content goes to a temporary neighbour of a name no other process uses, is synchronised, and
    is then moved over ``path``. If the body raises, the temporary file is removed and ``path`` is
    left as it was; if the process is killed, only the temporary file is left behind.
    """
    with temporary_file(path) as temporary:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    sync_folder(path.parent)


@contextmanager
def temporary_file(path: Path) -> Iterator[Path]:
    """A name beside ``path`` that no other process uses; what is there at the end is removed."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}{_TEMPORARY_SUFFIX}")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def remove_partial_files(folder: Path) -> None:
    """Remove what killed writers left in ``folder``. No writer may be at work there."""
    for path in folder.glob(f".*{_TEMPORARY_SUFFIX}"):
        path.unlink(missing_ok=True)


def write_shard(path: Path, samples: Iterable[Sample]) -> ShardRecord:
    """Write ``samples`` to the tar file ``path`` atomically.

    Equal samples give equal bytes: times, owners and modes are fixed.

    Raises:
        ValueError: a key is empty, contains a dot (readers cut keys at the first one) or a slash,
            occurs twice, or makes a member name of more than 100 bytes.
    """
    keys: set[str] = set()
    with atomic_file(path) as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for sample in samples:
                if sample.key in keys:
                    raise ValueError(f"key {sample.key!r} occurs twice in shard {path.name}")
                keys.add(sample.key)
                for extension, content in sample.members.items():
                    member = tarfile.TarInfo(_member_name(sample.key, extension))
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        file.flush()
        record = ShardRecord(path.name, len(keys), file.tell(), _sha256(Path(file.name)))
    return record


def read_shard(path: Path) -> Iterator[Sample]:
    """Yield the samples of a shard in order.

    Raises:
        ValueError: the shard is damaged; the samples before the damage were given.
    """
    key, members = "", dict[str, bytes]()
    with open(path, "rb") as file:
        for found in tar_scan.scan(file):
            if isinstance(found, tar_scan.Damage):
                raise ValueError(f"shard: {path} is damaged at byte {found.offset}: {found.reason}")
            next_key, _, extension = found.name.partition(".")
            if members and next_key != key:
                yield Sample(key, members)
                members = {}
            key = next_key
            file.seek(found.offset)
            members[extension] = file.read(found.size)
    if members:
        yield Sample(key, members)


def _member_name(key: str, extension: str) -> str:
    name = f"{key}.{extension}"
    if not key or "." in key or "/" in key or len(name.encode()) > _LONGEST_NAME:
        raise ValueError(
            f"expected a key without dots and slashes whose member names have at most "
            f"{_LONGEST_NAME} bytes; got {name!r}"
        )
    return name


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    # A rename is on the disk only when its folder is; Windows cannot open folders, nor needs to.
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
