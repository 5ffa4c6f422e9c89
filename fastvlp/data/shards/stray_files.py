"""Files that lie among samples without being part of one."""

from __future__ import annotations

from pathlib import PurePosixPath

_ABOUT = ("readme", "license", "licence", "copying", "notice", "changelog", "citation")
_OF_SYSTEMS = ("thumbs.db", "desktop.ini")


def is_hidden(path: str) -> bool:
    """Whether an operating system left a file there: ``._0.jpg``, ``.DS_Store``, ``Thumbs.db``."""
    name = PurePosixPath(path).name
    return name.startswith(".") or name.lower() in _OF_SYSTEMS


def is_about(path: str) -> bool:
    """Whether a file tells something of the others: ``README.txt``, ``LICENSE``, ``notes.md``.

    A sample may have such a name too, so ask only of a file without an image beside it.
    """
    file = PurePosixPath(path)
    return file.suffix.lower() == ".md" or file.name.partition(".")[0].lower() in _ABOUT


def belongs_to_no_sample(path: str) -> bool:
    """Whether a member of a tar can be no part of a sample, whatever lies beside it."""
    return is_hidden(path) or "." not in PurePosixPath(path).name
