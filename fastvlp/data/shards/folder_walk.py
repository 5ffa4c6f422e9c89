"""All folders below one, linked ones too, each of them once."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Unread:
    """A folder that is not gone through here: "linked folder" or "unreadable folder", and why."""

    path: Path
    fault: str
    detail: str


def walk(top: Path) -> Iterator[tuple[Path, list[str]] | Unread]:
    """Each folder with the names of its files, sorted, or why it is left out.

    Linked folders come last. One that leads to a folder that was gone through already, be it a
    parent of its own, is left out.
    """
    links, seen = deque([Path(top)]), set[str]()
    errors: list[OSError] = []
    while links:
        link = links.popleft()
        if os.path.realpath(link) in seen:
            detail = f"it leads to {os.path.realpath(link)}, which is read elsewhere"
            yield Unread(link, "linked folder", detail)
            continue
        for root, folders, files in os.walk(link, onerror=errors.append):
            yield from _unreadable(errors)
            seen.add(os.path.realpath(root))
            paths = sorted(Path(root, name) for name in folders)
            links += [path for path in paths if path.is_symlink()]
            folders[:] = [
                path.name
                for path in paths
                if not path.is_symlink() and os.path.realpath(path) not in seen
            ]
            yield Path(root), sorted(files)
        yield from _unreadable(errors)


def _unreadable(errors: list[OSError]) -> Iterator[Unread]:
    while errors:
        error = errors.pop()
        yield Unread(Path(error.filename), "unreadable folder", error.strerror)
