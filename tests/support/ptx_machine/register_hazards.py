"""Finds reads of registers without a value, and misuse of those that wgmma works on meanwhile.

Kinds of findings:
    unwritten register  a read by lanes that have not written the register, which others have;
                        accumulators of wgmma are left out, since it may be told to ignore them
    pending registers   an access to accumulators before the products that add to them were waited
                        for, or a change of registers that such a product still reads
    wgmma.fence         registers of a product that were written after the last wgmma.fence
"""

from collections import defaultdict

import numpy as np

from .findings import Findings
from .lanes import Lanes
from .observer import Access, Observer
from .syntax import Instruction, Vector

WGMMA = "wgmma.mma_async"


class RegisterHazards(Observer):
    """Watches one launch of a kernel."""

    def __init__(self, findings: Findings):
        self.findings = findings

    def batch_begins(self, batch) -> None:
        self.batch, self.tick = batch, 0
        steps = [s for s in batch.program.steps if s.instruction.opcode.startswith(WGMMA)]
        self.slots = {s.instruction: _fragments(s.instruction) for s in steps}
        # Registers of products, those that are under way, by how many in each slot of a thread.
        self.watched = frozenset().union(*(a | d for a, d in self.slots.values()))
        size = batch.layout.size
        self.added_to: dict[int, np.ndarray] = {}
        self.read: dict[int, np.ndarray] = {}
        self.written = defaultdict(lambda: np.full(size, -1, np.int64))
        self.fenced = np.full(size, -1, np.int64)
        # Registers that all threads have written at once; by whom the others were.
        self.whole: set[int] = set()
        self.partly: dict[int, np.ndarray] = {}
        self.threads = int(batch.layout.exists.sum())

    def guards(self, step, lanes: Lanes) -> None:
        self.check_written(step, lanes, frozenset({step.guard}))

    def executes(self, step, lanes: Lanes) -> None:
        reads = step.reads
        if step.instruction in self.slots:
            reads = reads - self.slots[step.instruction][1]
        self.check_written(step, lanes, reads)
        self.mark_written(step.writes - self.whole, lanes)
        if not self.watched:
            return
        self.tick += 1
        if step.instruction in self.slots:
            self.check_fence(step.instruction, lanes)
            return
        for register in step.writes & self.watched:
            self.written[register][lanes.index] = self.tick
            self.check_pending(step, lanes, register, self.read)
            self.check_pending(step, lanes, register, self.added_to)
        for register in (step.reads - step.writes) & self.added_to.keys():
            self.check_pending(step, lanes, register, self.added_to)

    def check_written(self, step, lanes: Lanes, registers: frozenset[int]) -> None:
        """Registers that nobody has written end the execution, in whatever reads them."""
        for register in (registers - self.whole) & self.partly.keys():
            missing = ~self.partly[register][lanes.index]
            if missing.any():
                self.report("unwritten register", step.instruction, lanes, missing,
                            "reads a register that it has not written")  # fmt: skip

    def mark_written(self, registers: frozenset[int], lanes: Lanes) -> None:
        if lanes.count == self.threads:
            self.whole |= registers
            return
        for register in registers:
            if register not in self.partly:
                self.partly[register] = np.zeros(self.batch.layout.size, bool)
            self.partly[register][lanes.index] = True

    def fences(self, fence: str, lanes: Lanes) -> None:
        if fence == "wgmma":
            self.fenced[lanes.index] = self.tick

    def accesses(self, access: Access) -> None:
        self._count(access, np.ones(access.lanes.count, bool), 1)

    def completes(self, access: Access, done: np.ndarray) -> None:
        self._count(access, done, -1)

    def _count(self, access: Access, chosen: np.ndarray, change: int) -> None:
        if access.instruction not in self.slots:
            return
        size = self.batch.layout.size
        slots = access.lanes.slots[chosen]
        for table, registers in zip(
            (self.read, self.added_to), self.slots[access.instruction], strict=True
        ):
            for register in registers:
                table.setdefault(register, np.zeros(size, np.int16))[slots] += change

    def check_pending(self, step, lanes: Lanes, register: int, table) -> None:
        if register in table:
            busy = table[register][lanes.index] > 0
            if busy.any():
                self.report("pending registers", step.instruction, lanes, busy,
                            "uses a register of a product that was not waited for")  # fmt: skip

    def check_fence(self, instruction: Instruction, lanes: Lanes) -> None:
        for register in self.slots[instruction][0] | self.slots[instruction][1]:
            if register in self.written:
                late = self.written[register][lanes.index] > self.fenced[lanes.index]
                if late.any():
                    self.report("wgmma.fence", instruction, lanes, late,
                                "uses a register written after the last wgmma.fence")  # fmt: skip

    def report(self, kind: str, instruction, lanes: Lanes, chosen: np.ndarray, what: str) -> None:
        name = self.batch.program.kernel.name
        self.findings.add(
            kind, (instruction.line,), int(chosen.sum()),
            lambda: f"{name}, line {instruction.line}, {instruction.text[:60]!r}: "
            f"{lanes.name(int(np.argmax(chosen)))} {what}",
        )  # fmt: skip


def _fragments(instruction: Instruction) -> tuple[frozenset[int], frozenset[int]]:
    """Slots of the registers of A, if it lies in registers, and of the accumulators."""
    d, a = instruction.operands[:2]
    left = frozenset(r.slot for r in a.elements) if isinstance(a, Vector) else frozenset()
    return left, frozenset(r.slot for r in d.elements)
