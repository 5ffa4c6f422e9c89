"""Counts what a kernel executes: the observer on which models of its time are built."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from .lanes import WARP, Lanes
from .observer import Access, Observer

SECTOR = 32
BANKS = 32
BANK_BYTES = 4


@dataclass
class Counts(Observer):
    """Dynamic counts over all blocks of a launch.

    An instruction counts once for each warp that executes it with at least one lane; `lanes`
    counts those lanes. Of global memory a request is one instruction of one warp, and a sector 32
    bytes that it touches, however many of its lanes do. Of shared memory a wavefront is one pass
    over the banks: what a request takes without conflicts is in `ideal_wavefronts`.
    """

    instructions: Counter = field(default_factory=Counter)  # by opcode
    pipes: Counter = field(default_factory=Counter)  # by class of execution unit
    lanes: Counter = field(default_factory=Counter)  # by opcode
    requests: Counter = field(default_factory=Counter)  # by (space, kind)
    sectors: Counter = field(default_factory=Counter)  # by kind, of global memory
    wavefronts: Counter = field(default_factory=Counter)  # by kind, of shared memory
    ideal_wavefronts: Counter = field(default_factory=Counter)
    bytes: Counter = field(default_factory=Counter)  # by (space, kind): what lanes asked for

    def executes(self, step, lanes: Lanes) -> None:
        opcode, warps = step.instruction.opcode, lanes.warp_count
        self.instructions[opcode] += warps
        self.pipes[step.pipe] += warps
        self.lanes[opcode] += lanes.count

    def accesses(self, access: Access) -> None:
        key = (access.space, access.kind)
        self.bytes[key] += access.width * len(access.positions)
        if access.lanes.count != len(access.positions):
            return
        self.requests[key] += access.lanes.warp_count
        if access.space == "global":
            self.sectors[access.kind] += sectors(access)
        elif access.space == "shared":
            taken, ideal = wavefronts(access)
            self.wavefronts[access.kind] += taken
            self.ideal_wavefronts[access.kind] += ideal

    def merge(self, other: "Counts") -> None:
        """Add the counts of another launch."""
        for name, counter in vars(self).items():
            counter.update(getattr(other, name))


def sectors(access: Access) -> int:
    """Pairs of a warp and a sector that it touches."""
    number = access.addresses.astype(np.int64) // SECTOR
    if access.width > SECTOR:
        raise ValueError(f"an access of {access.width} bytes a lane")
    return _distinct(access.lanes.slots // WARP, number)


def wavefronts(access: Access) -> tuple[int, int]:
    """Passes over the banks, and how many there would be without bank conflicts.

    Wide accesses go in parts: 8 bytes a lane by half warps, 16 by quarters. Lanes that touch the
    same word share it.
    """
    slots = access.lanes.slots
    at_once = min(WARP, WARP * BANK_BYTES // access.width)
    part = slots // at_once
    words = max(1, access.width // BANK_BYTES)
    first = access.addresses.astype(np.int64) // BANK_BYTES
    word = (first[:, None] + np.arange(words)).reshape(-1)
    owner = np.repeat(part, words)
    pairs = np.unique(np.stack([owner, word]), axis=1)
    groups, index = np.unique(pairs[0], return_inverse=True)
    load = np.zeros((len(groups), BANKS), np.int64)
    np.add.at(load, (index, pairs[1] % BANKS), 1)
    return int(load.max(1).sum()), len(groups)


def _distinct(a: np.ndarray, b: np.ndarray) -> int:
    return np.unique(np.stack([a, b]), axis=1).shape[1]
