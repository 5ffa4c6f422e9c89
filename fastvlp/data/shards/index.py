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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fastvlp.data.cache import cache_root
from fastvlp.data.images import integrity as image_check
from fastvlp.data.shards import tar as tar_scan
from fastvlp.data.shards.stray_files import belongs_to_no_sample, is_about
from fastvlp.data.shards.tar import Damage, Member
from fastvlp.data.shards.write import atomic_file

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm")
# What a caption may lie in, the first that a sample has; of a .json, under one of these keys.
_CAPTION_EXTENSIONS = ("txt", "caption", "json")
_CAPTION_KEYS = ("caption", "text")
# Byte ranges in the shard; a sample without an id has id_size -1. `text_json` is 1 where the
# caption is to be taken out of a .json.
ENTRY = np.dtype(
    [(f"{part}{field}", np.int64) for part in ("image", "text", "id") for field in ("", "_size")]
    + [("text_json", np.int64)]
)
# Raise when a scan comes to find something else in the same shard.
_FORMAT = 2
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


def index_of(
    path: str,
    decode: bool = False,
    cache_dir: str | os.PathLike | None = None,
    progress: Callable[[float], None] | None = None,
) -> ShardIndex:
    """The index of a shard, from the cache or by a scan that leaves it there.

    Args:
        path: the shard.
        decode: whether the scan decodes every image to be sure of it.
        cache_dir: the cache's root; see ``cache_root``.
        progress: called with the share of the shard that is scanned, as it grows.
    """
    facts = os.stat(path)
    identity = (_FORMAT, os.path.abspath(path), facts.st_size, facts.st_mtime_ns, decode)
    name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
    cached = cache_root(cache_dir) / "shard-index" / f"{name}.npz"
    index = _load(cached, path)
    if index is None:
        index = scan_shard(path, decode, progress)
        try:
            _save(cached, index)
        except OSError:  # a cache that cannot be written costs time, not the run
            pass
    return index


def scan_shard(
    path: str, decode: bool = False, progress: Callable[[float], None] | None = None
) -> ShardIndex:
    """Scan a shard. A file that is no plain tar gives an index without samples and its fault.

    Members that are no part of any sample (hidden files, READMEs, names without an extension) are
    passed over.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if reason := tar_scan.refusal(file):
            return ShardIndex(path, np.empty(0, ENTRY), (Fault("refused shard", path, "", reason),))
        entries, faults, strays = [], [], []
        for key, parts in _grouped(tar_scan.scan(file), strays):
            if isinstance(parts, Damage):
                at = f"{parts.reason} at byte {parts.offset}"
                faults.append(Fault("damaged shard", path, key, at))
                continue
            if _is_about(parts):
                strays += parts
                continue
            if progress:
                progress(parts[0].offset / size)
            kind, found = _examined(file, parts, decode)
            if kind:
                faults.append(Fault(kind, path, key, found))
            else:
                entries.append(found)
    if strays and not entries and not faults:
        reason = (
            f"it holds no sample: expected members KEY.jpg and KEY.txt; found {len(strays)} other "
            f"files, the first {strays[0].name!r}"
        )
        faults.append(Fault("refused shard", path, "", reason))
    return ShardIndex(path, np.array(entries, ENTRY), tuple(faults))


def _grouped(
    found: Iterable[Member | Damage], strays: list[Member]
) -> Iterator[tuple[str, list[Member] | Damage]]:
    """Neighbouring members of the same key; damages as they come. Adds to ``strays``."""
    key, parts = "", list[Member]()
    for each in found:
        if isinstance(each, Damage):
            if each.name and _key(each.name) == key:
                parts = []  # the rest of the sample is lost with it
            yield _key(each.name), each
            continue
        if belongs_to_no_sample(each.name):
            strays.append(each)
            continue
        if parts and _key(each.name) != key:
            yield key, parts
            parts = []
        key = _key(each.name)
        parts.append(each)
    if parts:
        yield key, parts


def _is_about(parts: list[Member]) -> bool:
    return all(is_about(part.name) and _extension(part) not in IMAGE_EXTENSIONS for part in parts)


def _key(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _extension(member: Member) -> str:
    return member.name.rpartition("/")[2].partition(".")[2].lower()


def _examined(file: BinaryIO, parts: list[Member], decode: bool):
    """("", entry) of a good sample, (kind, reason) of a broken one."""
    by_extension: dict[str, list[Member]] = {}
    for part in parts:
        use = _extension(part)
        by_extension.setdefault("image" if use in IMAGE_EXTENSIONS else use, []).append(part)
    images, ids = by_extension.get("image", []), by_extension.get("id", [])
    source = next((e for e in _CAPTION_EXTENSIONS if e in by_extension), None)
    texts = by_extension.get(source, [])
    for members, what in ((images, "image"), (texts, "caption (.txt, .caption or .json)")):
        if not members:
            return "missing part", f"the sample has no {what}"
    for members, what in ((images, "image"), (texts, "text"), (ids, "id")):
        if len(members) > 1:
            names = " and ".join(member.name for member in members)
            return "repeated part", f"the sample has more than one {what}: {names}"

    image, text, in_json = images[0], texts[0], source == "json"
    if reason := _text_fault(file, text, _LONGEST_CAPTION, "caption", in_json):
        return "caption", reason
    if ids and (reason := _text_fault(file, ids[0], _LONGEST_ID, "id")):
        return "id", reason
    if reason := image_check.fault(_read(file, image), decode):
        return "image", reason
    identity = ids[0] if ids else Member("", 0, -1)
    ranges = [n for part in (image, text, identity) for n in (part.offset, part.size)]
    return "", (*ranges, int(in_json))


def caption_in_json(content: bytes) -> str:
    """The caption of a sample's .json.

    Raises:
        ValueError: there is none; the message says why.
    """
    try:
        found = json.loads(content)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    found = found if isinstance(found, dict) else {}
    for key in _CAPTION_KEYS:
        if isinstance(found.get(key), str):
            return found[key].encode().decode()  # lone surrogates are no text
    names = " or ".join(f'"{key}"' for key in _CAPTION_KEYS)
    raise ValueError(f"it has no text under {names}")


def _text_fault(
    file: BinaryIO, member: Member, longest: int, what: str, in_json: bool = False
) -> str:
    if member.size > longest:
        return f"the {what} has {member.size} bytes, more than {longest}"
    content = _read(file, member)
    try:
        text = caption_in_json(content) if in_json else content.decode()
    except UnicodeError:
        return f"the {what} is not UTF-8"
    except ValueError as error:
        return f"no {what} in the .json, the only text of the sample: {error}"
    return "" if text.strip() else f"the {what} is empty"


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
