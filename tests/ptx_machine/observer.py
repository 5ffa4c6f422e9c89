"""What an execution tells those who watch it: counters, hazard detectors, a trace.

Observers see each event just before it takes effect. They must not change anything.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .lanes import Lanes
from .syntax import Instruction

if TYPE_CHECKING:
    from .program import Step


@dataclass(frozen=True)
class Access:
    """One memory access of an instruction, by the lanes that make it.

    space: "global", "shared" or "param". kind: "read", "write" or "atomic". positions [n] are
    flat in the space (see `memory`), addresses [n] as the program computed them, width is bytes a
    lane, values [n, ...] what a write stores. An asynchronous access has not happened when its
    instruction ends: `asynchronous` names how it runs ("cp.async", "wgmma", "bulk"), and
    `proxy` says through which proxy it goes ("generic" or "async").
    """

    instruction: Instruction
    lanes: Lanes
    space: str
    kind: str
    positions: np.ndarray
    addresses: np.ndarray
    width: int
    values: np.ndarray | None = None
    asynchronous: str | None = None
    proxy: str = "generic"


class Observer:
    """Does nothing at any event."""

    def batch_begins(self, batch) -> None:
        """`batch` is about to run (see `batch.Batch`)."""

    def batch_ends(self, batch) -> None:
        """All threads of the batch have ended."""

    def executes(self, step: "Step", lanes: Lanes) -> None:
        """`lanes` execute an instruction: those whose guard is true."""

    def accesses(self, access: Access) -> None:
        """An access to memory, before it takes effect."""

    def completes(self, access: Access, lanes: Lanes, rows: np.ndarray) -> None:
        """`lanes` waited for an asynchronous access: its rows [m] among its lanes are done."""

    def synchronizes(self, step: "Step", lanes: Lanes) -> None:
        """`lanes` leave a barrier of their block (or warp) together."""

    def fences(self, step: "Step", lanes: Lanes) -> None:
        """`lanes` execute a fence between proxies."""
