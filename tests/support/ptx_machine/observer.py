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
    flat in the space (see `memory`), addresses [n] as the program computed them, width is bytes
    each, values [n, ...] what a write stores, where that is known. rows [n] says which of the
    lanes makes each of them; None where it is one for each lane, in their order.

    An asynchronous access has not happened when its instruction ends: `asynchronous` names what
    it is waited for with ("cp.async", "wgmma", "bulk", "mbarrier"). `proxy`: through which proxy
    it goes ("generic" or "async").
    """

    instruction: Instruction
    lanes: Lanes
    space: str
    kind: str
    positions: np.ndarray
    addresses: np.ndarray
    width: int
    values: np.ndarray | None = None
    rows: np.ndarray | None = None
    asynchronous: str | None = None
    proxy: str = "generic"


class Observer:
    """Does nothing at any event."""

    def batch_begins(self, batch) -> None:
        """`batch` is about to run (see `batch.Batch`)."""

    def batch_ends(self, batch) -> None:
        """All threads of the batch have ended."""

    def guards(self, step: "Step", lanes: Lanes) -> None:
        """`lanes` read the guard of an instruction."""

    def executes(self, step: "Step", lanes: Lanes) -> None:
        """`lanes` execute an instruction: those whose guard is true."""

    def accesses(self, access: Access) -> None:
        """An access to memory, before it takes effect."""

    def completes(self, access: Access, done: np.ndarray) -> None:
        """Those of the access's lanes for which done [lanes] is true have waited for it."""

    def synchronizes(self, step: "Step", lanes: Lanes) -> None:
        """`lanes`, which waited at a barrier of their block (or warp), leave it together."""

    def reports(self, lanes: Lanes, barriers: np.ndarray) -> None:
        """`lanes` report at barriers [lanes] of their blocks and go on without waiting."""

    def hears(self, block: int, barrier: int, lanes: Lanes) -> None:
        """`lanes` leave a barrier of a block of the batch at which others have reported."""

    def fences(self, fence: str, lanes: Lanes) -> None:
        """`lanes` execute a fence: "proxy.async" or "wgmma"."""

    def initializes(self, objects: np.ndarray) -> None:
        """mbarrier objects [n] begin their first phase, which is phase 0."""

    def arrives(self, lanes: Lanes, objects: np.ndarray, phases: np.ndarray, copied: bool) -> None:
        """`lanes` arrive in phases [lanes] of mbarrier objects [lanes], or copies do that they
        have started."""

    def passes(self, lanes: Lanes, objects: np.ndarray, phases: np.ndarray) -> None:
        """`lanes` see that phases [lanes] of mbarrier objects [lanes] are over."""
