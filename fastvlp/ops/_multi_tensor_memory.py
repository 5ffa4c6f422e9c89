"""Whose memory the lists of a multi-tensor operator share: what the kernels check, for references.

Two places of the lists may share what they write only by being the same tensor in every list (tied
parameters); they are updated once. Nothing else that is written may overlap anything.
"""

from collections.abc import Iterator, Sequence

import torch

Lists = dict[str, Sequence[torch.Tensor]]


def without_ties(lists: Lists, read: Sequence[str]) -> list[list[torch.Tensor]]:
    """The lists, tied places once.

    Args:
        lists: by name, of equal length or empty; the first is written.
        read: the names of those that are not written.

    Raises:
        RuntimeError: written memory overlaps other memory. Nothing was written.
    """
    given = {name: tensors for name, tensors in lists.items() if tensors}
    first = next(iter(given))
    places: dict[int, tuple[int, tuple]] = {}
    for at, row in enumerate(zip(*given.values(), strict=True)):
        if not row[0].numel():
            continue
        for name, t in zip(given, row, strict=True):
            if name not in read and _lies_on_itself(t):
                raise RuntimeError(f"{name}[{at}]: expected every element at an address of its own")
        looks = tuple(map(_look, row))
        other, known = places.setdefault(row[0].data_ptr(), (at, looks))
        if known != looks:
            raise RuntimeError(
                f"{first}[{at}]: shares memory with {first}[{other}], so expected the same tensors "
                "beside it in the other lists"
            )
    kept = sorted(at for at, _ in places.values())
    _check_apart(given, read, kept)
    return [[tensors[at] for at in kept] if tensors else [] for tensors in lists.values()]


def _look(t: torch.Tensor) -> tuple:
    return t.data_ptr(), t.dtype, tuple(t.shape), t.stride()


def _sorted_strides(t: torch.Tensor) -> list[tuple[int, int]]:
    return sorted((s, n) for s, n in zip(t.stride(), t.shape, strict=True) if n > 1)


def _extent(t: torch.Tensor) -> int:
    return 1 + sum(stride * (size - 1) for stride, size in _sorted_strides(t))


def _lies_on_itself(t: torch.Tensor) -> bool:
    extent = 1
    for stride, size in _sorted_strides(t):
        if stride < extent:
            return True
        extent += (size - 1) * stride
    return False


def _ranges(given: Lists, read: Sequence[str], kept: list[int]) -> Iterator[tuple]:
    """(begin, end, written, name) of each piece of memory; none of places with gaps or of unlike
    strides, as in the kernels, because the ranges of such views may interleave."""
    for at in kept:
        row = {name: tensors[at] for name, tensors in given.items()}
        unlike = len({tuple(_sorted_strides(t)) for t in row.values()}) > 1
        if unlike or any(_extent(t) != t.numel() for t in row.values()):
            continue
        own: dict[tuple, tuple[bool, str]] = {}
        for name, t in row.items():
            written = name not in read
            key = t.data_ptr(), t.data_ptr() + t.numel() * t.element_size(), t.dtype
            if key in own and not (own[key][0] and written):  # a tensor and its own source
                written = written or own[key][0]
            elif key in own:
                yield (*key[:2], written, f"{name}[{at}]")
            own[key] = written, f"{name}[{at}]"
        yield from ((*key[:2], *found) for key, found in own.items())


def _check_apart(given: Lists, read: Sequence[str], kept: list[int]) -> None:
    last = last_written = (0, "")
    for begin, end, written, name in sorted(_ranges(given, read, kept)):
        other = last if written else last_written
        if begin < other[0]:
            raise RuntimeError(f"{name}: overlaps {other[1]}, and one of them is written")
        last = max(last, (end, name))
        if written:
            last_written = max(last_written, (end, name))
