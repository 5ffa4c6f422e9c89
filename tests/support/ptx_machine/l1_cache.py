"""Which sectors that loads touch a multiprocessor's L1 cache holds already."""

import numpy as np

from .observer import Access

# What bypasses L1, and loads that must see what others write meanwhile.
_PAST = {"cg", "cv", "bulk", "volatile", "relaxed", "acquire", "L1::no_allocate"}
_EMPTY = -1


class L1Cache:
    """The share of the L1 cache that each block has while others are resident with it.

    Each sector has one place, its number modulo the places: what a block reads again is there until
    as many bytes further on displace it. Real caches choose among several places, and blocks on a
    multiprocessor may find what another has read; writes go through to L2 in both.
    """

    def __init__(self, places: int):
        self.places = places
        self._held = np.empty((0, places), np.int64)

    def begin(self, blocks: int) -> None:
        """So many other blocks begin, with nothing in the cache."""
        self._held = np.full((blocks, self.places), _EMPTY)

    def misses(self, blocks: np.ndarray, sectors: np.ndarray) -> int:
        """How many of distinct pairs of a block and a sector are not held; they are then."""
        places = sectors % self.places
        missing = self._held[blocks, places] != sectors
        self._held[blocks, places] = sectors
        return int(missing.sum())


def goes_through_l1(access: Access) -> bool:
    """Whether a global access is a load that may hit L1, and leaves there what it has read."""
    return access.kind == "read" and not _PAST & set(access.instruction.opcode.split("."))
