"""Whether a launch gives the same bits in whatever order its blocks and warps run."""

import numpy as np

from . import machine
from .findings import Findings
from .hazards import watchers
from .memory import GlobalMemory
from .observer import Observer
from .program import Program
from .schedule import Schedule


def launch(
    program: Program,
    grid: tuple[int, int, int],
    parameters: np.ndarray,
    memory: GlobalMemory,
    findings: Findings,
    schedules: tuple[Schedule, ...],
    hazards: bool,
    observers: tuple[Observer, ...],
    **options,
) -> None:
    """`machine.launch` under all schedules, whose last results stay.

    findings: takes hazards, if they are looked for, and results that differ. observers watch the
    last execution.
    """
    compared = Comparison(memory, findings, program.kernel.name)
    for schedule in schedules:
        watching = watchers(findings) if hazards else ()
        if schedule is schedules[-1]:
            watching += observers
        compared.begin()
        machine.launch(
            program, grid, parameters, memory, schedule=schedule, observers=watching, **options
        )
        compared.end(schedule)


class Comparison:
    """Holds the memory of a launch under one schedule against that under the first one."""

    def __init__(self, memory: GlobalMemory, findings: Findings, kernel: str):
        self.memory, self.findings, self.kernel = memory, findings, kernel
        self.before: list[tuple[np.ndarray, np.ndarray | None]] | None = None
        self.first: tuple[Schedule, list[np.ndarray]] | None = None

    def begin(self) -> None:
        """Put memory into the state in which the launch found it."""
        allocations = self.memory.allocations
        if self.before is None:
            self.before = [
                (a.bytes.copy(), None if a.written is None else a.written.copy())
                for a in allocations
            ]
            return
        for allocation, (data, written) in zip(allocations, self.before, strict=True):
            allocation.bytes[:] = data
            if written is not None:
                allocation.written[:] = written

    def end(self, schedule: Schedule) -> None:
        """Compare what the launch left with what the first one did."""
        allocations = self.memory.allocations
        if self.first is None:
            self.first = schedule, [a.bytes.copy() for a in allocations]
            return
        for allocation, data in zip(allocations, self.first[1], strict=True):
            differ = np.flatnonzero(allocation.bytes != data)
            if len(differ):
                at = int(differ[0])
                self.findings.add(
                    "order", (self.kernel, allocation.name), len(differ),
                    lambda at=at, name=allocation.name: (
                        f"{self.kernel}: {name} differs from byte {at} on between {self.first[0]} "
                        f"and {schedule}"
                    ),
                )  # fmt: skip
