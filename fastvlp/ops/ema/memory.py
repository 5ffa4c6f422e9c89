"""Whose memory the lists of a multi-tensor operator share: what the kernels check, for references.

Two places of the lists may share what they write only by being the same tensor in every list (tied
parameters); they are updated once. Nothing else that is written may overlap anything.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

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
                "at both positions of the other lists"
            )
    kept = sorted(at for at, _ in places.values())
    _check_apart(given, read, kept)
    return [[tensors[at] for at in kept] if tensors else [] for tensors in lists.values()]


def _look(t: torch.Tensor) -> tuple:
    return t.data_ptr(), t.dtype, tuple(t.shape), t.stride()


def _sorted_strides(t: torch.Tensor) -> list[tuple[int, int]]:
    return sorted((s, n) for s, n in zip(t.stride(), t.shape, strict=True) if n > 1)


def _lies_on_itself(t: torch.Tensor) -> bool:
    extent = 1
    for stride, size in _sorted_strides(t):
        if stride < extent:
            return True
        extent += (size - 1) * stride
    return False


def _lie_alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one shape are the same elements in the same order."""
    pairs = zip(a.shape, a.stride(), b.stride(), strict=True)
    return (
        a.data_ptr() == b.data_ptr()
        and a.dtype == b.dtype
        and all(ours == theirs for size, ours, theirs in pairs if size > 1)
    )


class _Place(NamedTuple):
    """A tensor of a row and where it lies: from address `begin` up to `end`."""

    begin: int
    end: int
    row: int
    column: int
    written: bool
    tensor: torch.Tensor


def _places(given: Lists, read: Sequence[str], kept: list[int]) -> Iterator[_Place]:
    """The tensors of each row. One that stands twice in its row and is written once (a tensor and
    its own source) is read and written element by element, which is safe: it is one."""
    for at in kept:
        own: list[_Place] = []
        for column, (name, tensors) in enumerate(given.items()):
            t, written = tensors[at], name not in read
            twice = [
                i for i, other in enumerate(own)
                if _lie_alike(other.tensor, t) and not (other.written and written)
            ]  # fmt: skip
            if twice:
                i = twice[0]
                own[i] = own[i]._replace(written=own[i].written or written)
                continue
            reach = 1 + sum(stride * (size - 1) for stride, size in _sorted_strides(t))
            end = t.data_ptr() + reach * t.element_size()
            own.append(_Place(t.data_ptr(), end, at, column, written, t))
        yield from own


def _check_apart(given: Lists, read: Sequence[str], kept: list[int]) -> None:
    names = list(given)
    before: list[_Place] = []  # that reach to the present place
    for place in sorted(_places(given, read, kept), key=lambda place: place[:4]):
        before = [other for other in before if other.end > place.begin]
        for other in before:
            if (place.written or other.written) and share_bytes(place.tensor, other.tensor):
                raise RuntimeError(
                    f"{names[place.column]}[{place.row}]: overlaps "
                    f"{names[other.column]}[{other.row}], and one of them is written"
                )
        before.append(place)


def share_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether an element of `a` and one of `b` share a byte, exactly: views may interleave.

    The distances from elements of `a` to elements of `b` are the distance of the first ones plus a
    sum of stride * x with whole x between bounds; equal strides of both are one term.
    """
    bounds: dict[int, tuple[int, int]] = {}
    for t, backwards in ((a, True), (b, False)):
        for stride, size in _sorted_strides(t):
            least, most = bounds.get(stride * t.element_size(), (0, 0))
            bounds[stride * t.element_size()] = (
                (least - size + 1, most) if backwards else (least, most + size - 1)
            )
    terms = [(stride, *bounds[stride]) for stride in sorted(bounds, reverse=True) if stride]
    # Of the sum of terms k and after: its bounds, and what divides it.
    rest = [(0, 0, 0)]
    for stride, least, most in reversed(terms):
        low, high, divisor = rest[0]
        rest.insert(0, (low + stride * least, high + stride * most, math.gcd(divisor, stride)))

    def reaches(k: int, distance: int) -> bool:
        least, most = 1 - b.element_size() - distance, a.element_size() - 1 - distance
        low, high, divisor = rest[k]
        if high < least or low > most:
            return False
        if k == len(terms):
            return True
        if most // divisor * divisor < least:
            return False
        stride, fewest, greatest = terms[k]
        low, high, _ = rest[k + 1]
        first, last = -((high - least) // stride), (most - low) // stride
        return any(
            reaches(k + 1, distance + x * stride)
            for x in range(max(first, fewest), min(last, greatest) + 1)
        )

    return reaches(0, b.data_ptr() - a.data_ptr())
