"""The instructions that one warp executes, in their order."""

import numpy as np

from .lanes import Lanes
from .observer import Observer
from .program import Step


class Trace(Observer):
    """`steps`: what the first warp of block `number` executes with any of its lanes.

    number None: the block in the middle of the grid, which of blocks with different amounts of work
    is most often the average one.
    """

    def __init__(self, number: int | None = None):
        self.number = number
        self.steps: list[Step] = []
        self._first: int | None = None

    def batch_begins(self, batch) -> None:
        number = self.number
        if number is None:
            number = int(np.prod(batch.grid)) // 2
        layout = batch.layout
        here = (batch.numbers == number)[layout.block] & (layout.thread == 0)
        self._first = int(np.argmax(here)) if here.any() else None

    def executes(self, step: Step, lanes: Lanes) -> None:
        if self._first is not None and _meets(lanes, self._first):
            self.steps.append(step)


def _meets(lanes: Lanes, first: int) -> bool:
    """Whether any lane of the warp that begins at slot `first` is among `lanes`."""
    if isinstance(lanes.index, slice):
        return lanes.index.start < first + 32 and lanes.index.stop > first
    slots = lanes.slots
    at = int(np.searchsorted(slots, first))
    return at < len(slots) and slots[at] < first + 32
