"""Where the members of a tar file lie, damaged files included.

Python's ``tarfile`` stops at the first damage and at the first block of zeros, and readers of
WebDataset shards differ in how they take Pax headers. This scan reads headers only, goes on after a
damaged or zeroed one at the next whole header, reads archives that were joined into one file, and
reports every damage by its offset.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

_BLOCK = 512
# A tar ends with two blocks of zeros, and most programs fill up the record that these lie in.
_END, _RECORD = 2 * _BLOCK, 20 * _BLOCK
_CHUNK = 1 << 20
_REGULAR = (b"0", b"\0", b"7")
# The longest content of a Pax header or a long name that is believed.
_LONGEST_EXTENSION = 1 << 20
_PAX_LENGTH = re.compile(rb"([0-9]{1,19}) ")


@dataclass(frozen=True)
class Member:
    """A regular file in a tar: its name, and where its content lies."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Damage:
    """A place where a tar file is broken. ``name`` is that of the member concerned, if known."""

    offset: int
    reason: str
    name: str = ""


def refusal(file: BinaryIO) -> str:
    """Why a file is no tar at all, or "" where it is one."""
    file.seek(0)
    start = file.read(_BLOCK)
    if start[:2] == b"\x1f\x8b":
        return "it is compressed by gzip; decompress it (gunzip), members are read at random"
    if start[:4] == b"\x28\xb5\x2f\xfd" or start[:3] == b"BZh" or start[:6] == b"\xfd7zXZ\0":
        return "it is compressed; decompress it, members are read at random"
    if not start:
        return "it is empty"
    if start.strip(b"\0") and not _is_header(start):
        near = min(_CHUNK, _size(file))
        if _next_header(file, 0, near)[0] == near:
            return "it is no tar file"
    return ""


def scan(file: BinaryIO) -> Iterator[Member | Damage]:
    """Every member of a tar in order, and every damage where it is met."""
    size = _size(file)
    at, name, real_size = 0, None, None
    while at + _BLOCK <= size:
        file.seek(at)
        header = file.read(_BLOCK)
        if not _is_header(header):
            next_at, zeros = _next_header(file, at, size)
            if reason := _damage(at, next_at, zeros, next_at == size):
                yield Damage(at, reason)
            if next_at == size:
                return
            # A long name before the gap belonged to the member that is lost.
            at, name, real_size = next_at, None, None
            continue
        kind, length, content = header[156:157], _number(header[124:136]), at + _BLOCK
        if kind in _REGULAR and real_size is not None:
            length = real_size
        if content + length > size:
            yield Damage(at, "the file ends inside of this member", name or _name(header))
            return
        if kind == b"L" and length <= _LONGEST_EXTENSION:
            name = _text(file.read(length).split(b"\0", 1)[0])
        elif kind == b"x" and length <= _LONGEST_EXTENSION:
            records = dict(_pax_records(file.read(length)))
            name = records.get("path", name)
            told = records.get("size", "")
            real_size = int(told) if re.fullmatch("[0-9]{1,19}", told) else None
        else:
            if kind in _REGULAR:
                yield Member(name or _name(header), content, length)
            name = real_size = None
        at = content + -(-length // _BLOCK) * _BLOCK
    yield Damage(min(at, size), "the file ends without a tar's end")


def _next_header(file: BinaryIO, at: int, size: int) -> tuple[int, bool]:
    """Where the first whole header at or after ``at`` is, and whether only zeros come before it.

    Headers are looked for at whole blocks from ``at``. Where there is none the place is ``size``.
    """
    zeros = True
    for start in range(at, size, _CHUNK):
        file.seek(start)
        chunk = file.read(min(_CHUNK, size - start))
        first = len(chunk) - len(chunk.lstrip(b"\0"))
        for place in range(first - first % _BLOCK, len(chunk), _BLOCK):
            block = chunk[place : place + _BLOCK]
            if _is_header(block):
                return start + place, zeros
            zeros = zeros and not block.strip(b"\0")
    return size, zeros


def _damage(at: int, next_at: int, zeros: bool, last: bool) -> str:
    """Why what lies between two headers is no end of a tar, or "" where it is one.

    Args:
        at, next_at: where what is no header begins, and the header after it.
        zeros: whether there is nothing but zeros.
        last: whether ``next_at`` is the end of the file.
    """
    if not zeros:
        return "a damaged tar header"
    if not last:
        what = "another tar was joined to this one, or members are lost"
        return f"{next_at - at} bytes of zeros before the next member: {what}"
    if next_at <= -(-(at + _END) // _RECORD) * _RECORD:
        return ""
    what = "more than a tar's end takes, so members may be lost"
    return f"{next_at - at} bytes of zeros to the end of the file: {what}"


def name_before(file: BinaryIO, offset: int) -> str:
    """The name in the header of the member whose content begins at ``offset``."""
    file.seek(offset - _BLOCK)
    return _name(file.read(_BLOCK))


def _size(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size


def _is_header(block: bytes) -> bool:
    if len(block) < _BLOCK:
        return False
    try:
        told = int(block[148:156].strip(b" \0") or b"x", 8)
    except ValueError:
        return False
    return told == sum(block[:148]) + 8 * 32 + sum(block[156:]) and _number(block[124:136]) >= 0


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # base 256, for members of 8 GiB and more
        return int.from_bytes(field[1:], "big") if field[0] == 0x80 else -1
    try:
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        return -1


def _name(header: bytes) -> str:
    name = _text(header[:100].split(b"\0", 1)[0])
    prefix = _text(header[345:500].split(b"\0", 1)[0]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def _pax_records(content: bytes) -> Iterator[tuple[str, str]]:
    at = 0
    while length := _PAX_LENGTH.match(content, at):
        end = at + int(length[1])
        if end <= at:
            return
        key, _, value = content[length.end() : end - 1].partition(b"=")
        yield _text(key), _text(value)
        at = end
