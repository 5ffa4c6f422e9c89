"""What a WebDataset shard holds: where each sample's image, caption and id lie, and what is broken.

A shard is scanned once. Its index goes to the cache folder under a name made of the shard's path,
size and modification time, so that a changed shard is scanned anew.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fastvlp.data import image_check, tar_scan
from fastvlp.data.cache import cache_root
from fastvlp.data.shards import atomic_file
from fastvlp.data.tar_scan import Damage, Member

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm")
# Byte ranges in the shard; a sample without an id has id_size -1.
ENTRY = np.dtype(
    [(f"{part}{field}", np.int64) for part in ("image", "text", "id") for field in ("", "_size")]
)
_FORMAT = 1
_LONGEST_CAPTION, _LONGEST_ID = 1 << 20, 1 << 12


@dataclass(frozen=True)
class Fault:
    """One thing that is left out, and why.

    ``kind`` is "image", "caption", "missing part", "repeated part", "id" or "unreadable" (when it
    was its turn) for a sample, "damaged shard" for a place in a shard, and "refused shard" for all
    of one.
    """

    kind: str
    shard: str
    key: str
    reason: str

    @property
    def is_sample(self) -> bool:
        return not self.kind.endswith("shard")

    def __str__(self) -> str:
        return f"{self.shard}{f', {self.key!r}' if self.key else ''}: {self.reason}"


@dataclass(frozen=True)
class ShardIndex:
    """The good samples of one shard in their order, and its faults."""

    path: str
    entries: np.ndarray
    faults: tuple[Fault, ...]

    def __len__(self) -> int:
        return len(self.entries)


def index_of(path: str, decode: bool = False, cache_dir: str | os.PathLike | None = None):
    """The index of a shard, from the cache or by a scan that leaves it there.

    Args:
        path: the shard.
        decode: whether the scan decodes every image to be sure of it.
        cache_dir: the cache's root; see ``cache_root``.
    """
    facts = os.stat(path)
    identity = (_FORMAT, os.path.abspath(path), facts.st_size, facts.st_mtime_ns, decode)
    name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
    cached = cache_root(cache_dir) / "shard-index" / f"{name}.npz"
    index = _load(cached, path)
    if index is None:
        index = scan_shard(path, decode)
        try:
            _save(cached, index)
        except OSError:  # a cache that cannot be written costs time, not the run
            pass
    return index


def scan_shard(path: str, decode: bool = False) -> ShardIndex:
    """Scan a shard. A file that is no plain tar gives an index without samples and its fault."""
    with open(path, "rb") as file:
        if reason := tar_scan.refusal(file):
            return ShardIndex(path, np.empty(0, ENTRY), (Fault("refused shard", path, "", reason),))
        entries, faults = [], []
        for key, parts in _grouped(tar_scan.scan(file)):
            if isinstance(parts, Damage):
                at = f"{parts.reason} at byte {parts.offset}"
                faults.append(Fault("damaged shard", path, key, at))
                continue
            kind, found = _examined(file, parts, decode)
            if kind:
                faults.append(Fault(kind, path, key, found))
            else:
                entries.append(found)
    return ShardIndex(path, np.array(entries, ENTRY), tuple(faults))


def _grouped(found: Iterable[Member | Damage]) -> Iterator[tuple[str, list[Member] | Damage]]:
    """Neighbouring members of the same key; damages as they come."""
    key, parts = "", list[Member]()
    for each in found:
        if isinstance(each, Damage):
            if each.name and _key(each.name) == key:
                parts = []  # the rest of the sample is lost with it
            yield _key(each.name), each
            continue
        if parts and _key(each.name) != key:
            yield key, parts
            parts = []
        key = _key(each.name)
        parts.append(each)
    if parts:
        yield key, parts


def _key(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _examined(file: BinaryIO, parts: list[Member], decode: bool):
    """("", entry) of a good sample, (kind, reason) of a broken one."""
    by_use: dict[str, list[Member]] = {"image": [], "text": [], "id": []}
    for part in parts:
        extension = part.name.rpartition("/")[2].partition(".")[2].lower()
        use = {"txt": "text", "id": "id"}.get(extension)
        if extension in IMAGE_EXTENSIONS:
            use = "image"
        if use:
            by_use[use].append(part)
    for use, what in (("image", "image"), ("text", "caption (.txt)")):
        if not by_use[use]:
            return "missing part", f"the sample has no {what}"
    for use, members in by_use.items():
        if len(members) > 1:
            names = " and ".join(member.name for member in members)
            return "repeated part", f"the sample has more than one {use}: {names}"

    text, image = by_use["text"][0], by_use["image"][0]
    if reason := _text_fault(file, text, _LONGEST_CAPTION, "caption"):
        return "caption", reason
    if by_use["id"] and (reason := _text_fault(file, by_use["id"][0], _LONGEST_ID, "id")):
        return "id", reason
    if reason := image_check.fault(_read(file, image), decode):
        return "image", reason
    identity = by_use["id"][0] if by_use["id"] else Member("", 0, -1)
    return "", tuple(n for part in (image, text, identity) for n in (part.offset, part.size))


def _text_fault(file: BinaryIO, member: Member, longest: int, what: str) -> str:
    if member.size > longest:
        return f"the {what} has {member.size} bytes, more than {longest}"
    try:
        return "" if _read(file, member).decode().strip() else f"the {what} is empty"
    except UnicodeDecodeError:
        return f"the {what} is not UTF-8"


def _read(file: BinaryIO, member: Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)


def _save(path: Path, index: ShardIndex) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [astuple(fault)[:1] + astuple(fault)[2:] for fault in index.faults]
    faults = np.frombuffer(json.dumps(rows).encode(), np.uint8)
    content = io.BytesIO()
    np.savez(content, entries=index.entries, faults=faults)
    with atomic_file(path) as file:
        file.write(content.getvalue())


def _load(cached: Path, path: str) -> ShardIndex | None:
    try:
        with np.load(cached, allow_pickle=False) as stored:
            entries, rows = stored["entries"], json.loads(stored["faults"].tobytes())
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    if entries.dtype != ENTRY:
        return None
    return ShardIndex(path, entries, tuple(Fault(kind, path, *rest) for kind, *rest in rows))
