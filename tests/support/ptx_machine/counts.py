"""Counts what a kernel executes: the observer on which models of its time are built."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from .l1_cache import L1Cache, goes_through_l1
from .lanes import WARP, Lanes
from .observer import Access, Observer

SECTOR = 32
BANKS = 32
BANK_BYTES = 4
WARPGROUP = 4  # warps
PAGE = 1 << 15  # sectors


@dataclass
class Counts(Observer):
    """Dynamic counts over all blocks of a launch.

    An instruction counts once for each warp that executes it with at least one lane; `lanes`
    counts those lanes. A product of a warpgroup counts once for the group. Of global memory a
    request is one instruction of one warp, and a sector 32 bytes that it touches, however many of
    its lanes do; `distinct_bytes` counts each sector once for the whole launch. Of shared memory a
    wavefront is one pass over the banks: what a request takes without conflicts is in
    `ideal_wavefronts`. Matrix instructions that read shared memory themselves are in
    `tensor_shared_bytes`.

    `l2_sectors` are the sectors that go on to L2: all of them, or with an `l1` those that loads do
    not find there. Lanes of several warps that load a sector at the same time get it once.
    """

    instructions: Counter = field(default_factory=Counter)  # by opcode
    pipes: Counter = field(default_factory=Counter)  # by class of execution unit
    lanes: Counter = field(default_factory=Counter)  # by opcode
    tensor: Counter = field(default_factory=Counter)  # by opcode, of the matrix units
    requests: Counter = field(default_factory=Counter)  # by (space, kind)
    sectors: Counter = field(default_factory=Counter)  # by kind, of global memory
    l2_sectors: Counter = field(default_factory=Counter)  # the same, past L1
    wavefronts: Counter = field(default_factory=Counter)  # by kind, of shared memory
    ideal_wavefronts: Counter = field(default_factory=Counter)
    bytes: Counter = field(default_factory=Counter)  # by (space, kind): what lanes asked for
    distinct_bytes: Counter = field(default_factory=Counter)  # by kind, and "any" of them
    tensor_shared_bytes: int = 0
    barriers: int = 0  # of a warp
    blocks: int = 0
    l1: L1Cache | None = None

    def __post_init__(self) -> None:
        # Marks of the sectors of a page, by kind and page.
        self._touched: dict[tuple[str, int], np.ndarray] = {}

    def batch_begins(self, batch) -> None:
        self.blocks += len(batch.numbers)
        if self.l1:
            self.l1.begin(len(batch.numbers))

    def executes(self, step, lanes: Lanes) -> None:
        opcode, warps = step.instruction.opcode, lanes.warp_count
        if step.scope == "warpgroup" and step.pipe == "tensor":
            warps //= WARPGROUP
        self.instructions[opcode] += warps
        self.pipes[step.pipe] += warps
        self.lanes[opcode] += lanes.count
        if step.pipe == "tensor":
            self.tensor[opcode] += warps

    def synchronizes(self, step, lanes: Lanes) -> None:
        self.barriers += lanes.warp_count

    def reports(self, lanes: Lanes, barriers) -> None:
        self.barriers += lanes.warp_count

    def accesses(self, access: Access) -> None:
        key = (access.space, access.kind)
        if access.asynchronous == "wgmma":
            self.tensor_shared_bytes += access.width * _distinct_places(access)
            return
        self.bytes[key] += access.width * len(access.positions)
        self.requests[key] += len(np.unique(_slots(access) // WARP))
        if access.space == "global":
            touched = sectors(access)
            self.sectors[access.kind] += touched
            cached = self.l1 and goes_through_l1(access)
            self.l2_sectors[access.kind] += self._misses(access) if cached else touched
            self._touch(access)
        elif access.space == "shared":
            taken, ideal = wavefronts(access)
            self.wavefronts[access.kind] += taken
            self.ideal_wavefronts[access.kind] += ideal

    def _misses(self, access: Access) -> int:
        numbers = access.addresses.astype(np.int64) // SECTOR
        blocks = access.lanes.block if access.rows is None else access.lanes.block[access.rows]
        return self.l1.misses(*_distinct_pairs(blocks, numbers))

    def _touch(self, access: Access) -> None:
        steps = np.arange(0, max(1, access.width // SECTOR))
        first = access.addresses.astype(np.int64) // SECTOR
        numbers = np.unique(first[:, None] + steps)
        for page in np.unique(numbers // PAGE):
            offsets = numbers[numbers // PAGE == page] % PAGE
            for kind in (access.kind, "any"):
                marks = self._touched.setdefault((kind, int(page)), np.zeros(PAGE, bool))
                self.distinct_bytes[kind] += SECTOR * int((~marks[offsets]).sum())
                marks[offsets] = True

    def merge(self, other: "Counts") -> None:
        """Add the counts of another launch, of which distinct bytes are taken as its own."""
        for name, value in vars(other).items():
            if isinstance(value, Counter):
                getattr(self, name).update(value)
            elif isinstance(value, int):
                setattr(self, name, getattr(self, name) + value)


def _slots(access: Access) -> np.ndarray:
    """The slot of the thread that makes each access."""
    slots = access.lanes.slots
    return slots if access.rows is None else slots[access.rows]


def _distinct_places(access: Access) -> int:
    """Places of a matrix operand, each once, though several warps are said to read it."""
    return len(np.unique(access.positions))


def sectors(access: Access) -> int:
    """Pairs of a warp and a sector that it touches."""
    number = access.addresses.astype(np.int64) // SECTOR
    if access.width > SECTOR:
        return len(number) * access.width // SECTOR
    return len(_distinct_pairs(_slots(access) // WARP, number)[0])


def wavefronts(access: Access) -> tuple[int, int]:
    """Passes over the banks, and how many there would be without bank conflicts.

    Wide accesses go in parts: 8 bytes a lane by half warps, 16 by quarters. Lanes that touch the
    same word share it.
    """
    slots = _slots(access)
    at_once = min(WARP, WARP * BANK_BYTES // access.width)
    part = slots // at_once
    words = max(1, access.width // BANK_BYTES)
    first = access.addresses.astype(np.int64) // BANK_BYTES
    word = (first[:, None] + np.arange(words)).reshape(-1)
    owner = np.repeat(part, words)
    span = int(word.max()) + 1
    pairs = np.unique(owner * span + word)
    owners, banks = pairs // span, pairs % span % BANKS
    groups, index = np.unique(owners, return_inverse=True)
    load = np.bincount(index * BANKS + banks, minlength=len(groups) * BANKS)
    return int(load.reshape(-1, BANKS).max(1).sum()), len(groups)


def _distinct_pairs(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    low = int(b.min())
    span = int(b.max()) - low + 1
    pairs = np.unique(a * span + (b - low))
    return pairs // span, pairs % span + low
