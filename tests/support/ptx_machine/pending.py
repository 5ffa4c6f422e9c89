"""Asynchronous operations that were started and not yet waited for, by groups of each thread."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .lanes import Lanes
from .observer import Access


@dataclass
class Started:
    """An operation of some lanes. group [lanes] numbers the group of each, left [lanes] says who
    has not waited for it yet; effect(chosen [lanes]) makes it happen for those lanes."""

    lanes: Lanes
    accesses: tuple[Access, ...]
    group: np.ndarray
    left: np.ndarray
    effect: Callable[[np.ndarray], None]


class Pending:
    """The operations of one kind ("cp.async", "wgmma" or "bulk") of a batch.

    Under an early schedule an operation takes effect when it is started, under a late one when
    it is waited for; observers learn of its end at the wait in either case.
    """

    def __init__(self, batch, kind: str):
        self.batch, self.kind = batch, kind
        self.late = batch.schedule.late
        self.committed = np.zeros(batch.layout.size, np.int64)
        self.started: list[Started] = []

    def start(self, lanes: Lanes, accesses: tuple[Access, ...], effect) -> None:
        left = np.ones(lanes.count, bool)
        if not self.late:
            effect(left)
        self.started.append(
            Started(lanes, accesses, self.committed[lanes.index].copy(), left, effect)
        )

    def commit(self, lanes: Lanes) -> None:
        self.committed[lanes.index] += 1

    def wait(self, lanes: Lanes, most: int) -> None:
        """Until at most the latest `most` groups of each lane are not done; oldest first."""
        if not self.started:
            return
        waits = np.zeros(self.batch.layout.size, bool)
        waits[lanes.index] = True
        for operation in self.started:
            index = operation.lanes.index
            done = operation.left & waits[index]
            done &= operation.group < self.committed[index] - most
            if done.any():
                if self.late:
                    operation.effect(done)
                operation.left &= ~done
                for access in operation.accesses:
                    self.batch.completed(access, done)
        self.started = [operation for operation in self.started if operation.left.any()]
