"""Runs the threads of a batch: divergence, reconvergence, barriers, and who runs next.

Threads at one instruction form a group. Of the groups of a strand the one furthest behind in the
text runs, until it catches up with the next, which it joins; so the two sides of a branch meet
again where they come together. Threads that must wait for others are parked.
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from .control import Barrier, Branch, Exit, PhaseWait, WarpBarrier
from .errors import ProgramError
from .lanes import WARP, Lanes, require_whole_warps
from .program import Step


@dataclass
class Group:
    at: int
    lanes: Lanes


class Execution:
    """One batch from its first instruction to the last."""

    def __init__(self, batch, steps: list[Step], apart: bool):
        self.batch, self.steps, self.apart = batch, steps, apart
        self.strands: dict[int, list[Group]] = defaultdict(list)
        self.parked: dict[int, list[Lanes]] = defaultdict(list)
        # Who waits for the phase of an mbarrier: the position and the step of the instruction.
        self.waiting: list[tuple[int, Step, Lanes]] = []
        self.barriers = Barriers(batch.layout)
        self.ended = ~batch.layout.exists

    def run(self) -> None:
        everyone = Lanes(self.batch, slice(0, self.batch.layout.size))
        self.resume(everyone.where(self.batch.layout.exists), 0)
        while True:
            ready = [strand for strand, groups in self.strands.items() if groups]
            if ready:
                self.run_strand(self.strands[min(ready)])
            elif self.waiting and self.look_again():
                continue
            elif self.ended.all():
                return
            else:
                self.raise_deadlock()

    def resume(self, lanes: Lanes, at: int) -> None:
        """Let lanes go on at an instruction, each in its strand."""
        if not self.apart:
            self._join(self.strands[0], Group(at, lanes))
            return
        strand = self.batch.layout.strand[lanes.slots]
        for number in np.unique(strand):
            part = Lanes(self.batch, lanes.slots[strand == number])
            self._join(self.strands[int(number)], Group(at, part))

    @staticmethod
    def _join(groups: list[Group], new: Group) -> None:
        for group in groups:
            if group.at == new.at:
                group.lanes = group.lanes.union(new.lanes)
                return
        groups.append(new)
        groups.sort(key=lambda group: group.at)

    def run_strand(self, groups: list[Group]) -> None:
        """Run the group that is furthest behind until it meets another, waits or ends."""
        group = groups.pop(0)
        meets = groups[0].at if groups else len(self.steps)
        at, lanes, steps = group.at, group.lanes, self.steps
        while at < meets:
            step = steps[at]
            if step.scope != "lane":
                self.meet(at, step, lanes)
                return
            active = lanes if step.guard is None else self.guarded(step, lanes)
            if step.control is not None:
                self.decide(at, step, lanes, active)
                return
            if active is not None:
                self.batch.execute(step, active)
            at += 1
        if at >= len(steps):
            self.end(lanes)
        else:
            self._join(groups, Group(at, lanes))

    def guarded(self, step: Step, lanes: Lanes) -> Lanes | None:
        """The lanes whose guard holds; None if there are none."""
        register = lanes.registers[step.guard]
        if register is None:
            raise ProgramError(f"{self.batch.where(step)}: the guard is read before it is written")
        self.batch.guards(step, lanes)
        holds = register[lanes.index]
        if step.instruction.guard.negated:
            holds = ~holds
        if not holds.any():
            return None
        return lanes.where(holds)

    def decide(self, at: int, step: Step, lanes: Lanes, active: Lanes | None) -> None:
        """A branch, an exit or a wait of the lanes whose guard holds."""
        if active is not None:
            self.batch.observe(step, active)
            if isinstance(step.control, Exit):
                self.end(active)
            elif isinstance(step.control, PhaseWait):
                self.wait(at, step, active)
            else:
                assert isinstance(step.control, Branch)
                self.resume(active, step.control.target)
        if active is None:
            self.resume(lanes, at + 1)
        elif active is not lanes:
            rest = np.setdiff1d(lanes.slots, active.slots, assume_unique=True)
            self.resume(Lanes(self.batch, rest), at + 1)

    def wait(self, at: int, step: Step, lanes: Lanes) -> None:
        passed = step.control.passed(lanes)
        if passed.any():
            some = lanes.where(passed)
            step.control.finish(some)
            self.resume(some, at + 1)
        if not passed.all():
            self.waiting.append((at, step, lanes.where(~passed)))

    def look_again(self) -> bool:
        """Let those go on whose phase is over by now; whether there are any.

        Nobody else can run, so if need be copies that are still under way arrive.
        """
        while True:
            waiting, self.waiting = self.waiting, []
            for at, step, lanes in waiting:
                self.wait(at, step, lanes)
            if any(self.strands.values()):
                return True
            if not self.batch.deliver():
                return False

    def end(self, lanes: Lanes) -> None:
        self.ended[lanes.index] = True
        self.batch.ends(lanes)
        self.release(self.barriers.end(lanes))

    # Instructions at which threads meet.

    def meet(self, at: int, step: Step, lanes: Lanes) -> None:
        """Park lanes at an instruction until their warp, or warpgroup, is there as a whole."""
        self.parked[at].append(lanes)
        together = self.parked[at][0]
        for other in self.parked[at][1:]:
            together = together.union(other)
        size = WARP if step.scope == "warp" else 4 * WARP
        whole = self.batch.layout.complete(together, size)
        self.parked[at] = []
        if whole is not together:
            missing = np.setdiff1d(together.slots, whole.slots, assume_unique=True)
            self.parked[at] = [Lanes(self.batch, missing)]
        if whole.count:
            self.act_together(at, step, whole)

    def act_together(self, at: int, step: Step, lanes: Lanes) -> None:
        active = lanes if step.guard is None else self.guarded(step, lanes)
        if active is not None:
            size = WARP if step.scope == "warp" else 4 * WARP
            if self.batch.layout.complete(active, size) is not active:
                raise ProgramError(
                    f"{self.batch.where(step)}: the guard holds for a part of the lanes only "
                    f"({active.name(0)})"
                )
            self.batch.observe(step, active)
            if isinstance(step.control, Barrier):
                rest = np.setdiff1d(lanes.slots, active.slots, assume_unique=True)
                if len(rest):
                    self.resume(Lanes(self.batch, rest), at + 1)
                self.arrive(at, step, active)
                return
            if isinstance(step.control, WarpBarrier):
                self.batch.synchronized(step, active)
            else:
                require_whole_warps(active, self.batch.where(step))
                step.operation(active)
        self.resume(lanes, at + 1)

    def arrive(self, at: int, step: Step, lanes: Lanes) -> None:
        if not step.control.waits:
            self.batch.reports(lanes, self.barriers.numbers(step, lanes))
            self.resume(lanes, at + 1)
        self.release(self.barriers.arrive(at, step, lanes))

    def release(self, released: list["Release"]) -> None:
        for leaving in released:
            if leaving.waited.count:
                self.batch.synchronized(leaving.step, leaving.waited)
            for (block, number), lanes in leaving.reported.items():
                self.batch.hears(block, number, lanes)
            for at, lanes in leaving.positions.items():
                self.resume(lanes, at + 1)

    def raise_deadlock(self) -> None:
        lines = []
        for at, parked in self.parked.items():
            for lanes in parked:
                lines.append(
                    f"{lanes.count} threads ({lanes.name(0)}, ...) wait for the rest of their "
                    f"warp at {self.batch.where(self.steps[at])}"
                )
        for _, step, lanes in self.waiting:
            lines.append(
                f"{lanes.count} threads ({lanes.name(0)}, ...) wait for a phase that never ends at "
                f"{self.batch.where(step)}"
            )
        lines += self.barriers.describe(self.batch)
        raise ProgramError("divergent threads wait for ever: " + "; ".join(lines))


# How many barriers a block has.
BARRIERS = 16


@dataclass
class Release:
    """A barrier instruction that is complete in some blocks: who waited, by position of the
    instruction too, and, by (block, barrier) at which others only reported, who waited there."""

    step: Step
    waited: Lanes
    positions: dict[int, Lanes]
    reported: dict[tuple[int, int], Lanes]


class Barriers:
    """Who has come to which barrier of which block."""

    def __init__(self, layout):
        self.layout = layout
        self.alive = np.full(layout.block_count, layout.threads_per_block)
        # By (block, barrier): arrivals as (step, position of the step, lanes, expected count).
        self.waiting: dict[tuple[int, int], list[tuple[Step, int, Lanes, int | None]]] = {}

    @staticmethod
    def numbers(step: Step, lanes: Lanes) -> np.ndarray:
        """[lanes]: the barrier at which each arrives."""
        number = np.broadcast_to(step.control.number(lanes), lanes.count)
        stray = np.flatnonzero(number >= BARRIERS)
        if len(stray):
            raise ProgramError(
                f"{lanes.batch.where(step)}: a block has barriers 0 to {BARRIERS - 1}, not "
                f"{number[stray[0]]} ({lanes.name(int(stray[0]))})"
            )
        return number

    def arrive(self, at: int, step: Step, lanes: Lanes) -> list[Release]:
        barrier, number = step.control, self.numbers(step, lanes)
        count = None
        if barrier.count is not None:
            count = np.broadcast_to(barrier.count(lanes), lanes.count)
        if whole := self._all_at_once(step, lanes, number, count):
            return [Release(step, lanes, {at: lanes}, {})] if whole else []
        block = lanes.block
        for b in np.unique(block):
            for n in np.unique(number[block == b]):
                chosen = (block == b) & (number == n)
                counts = [] if count is None else np.unique(count[chosen]).tolist()
                if len(counts) > 1:
                    raise ProgramError(
                        f"barrier {n} of a block is told to expect {counts} threads "
                        f"({lanes.where(chosen).name(0)})"
                    )
                expected = counts[0] if counts else None
                self.waiting.setdefault((int(b), int(n)), []).append(
                    (step, at, lanes.where(chosen), expected)
                )
        return self._complete(np.unique(block))

    def _all_at_once(self, step, lanes, number, count) -> bool:
        """The usual case: all threads of their blocks come together and nobody else waits."""
        if self.waiting or count is not None or not step.control.waits:
            return False
        if (number != number[0]).any():
            return False
        return bool((np.bincount(lanes.block, minlength=len(self.alive))[lanes.block]
                     == self.alive[lanes.block]).all())  # fmt: skip

    def end(self, lanes: Lanes) -> list[Release]:
        np.subtract.at(self.alive, lanes.block, 1)
        return self._complete(np.unique(lanes.block)) if self.waiting else []

    def _complete(self, blocks) -> list[Release]:
        chosen = set(int(b) for b in blocks)
        released: dict[Step, dict[tuple[int, int], list]] = {}
        for key in [key for key in self.waiting if key[0] in chosen]:
            arrivals = self.waiting[key]
            expected = {self.alive[key[0]] if e is None else e for *_, e in arrivals}
            if len(expected) > 1:
                raise ProgramError(
                    f"barrier {key[1]} of a block is told to expect {sorted(expected)} threads "
                    f"({arrivals[0][2].name(0)})"
                )
            present = sum(lanes.count for _, _, lanes, _ in arrivals)
            if present > next(iter(expected)):
                raise ProgramError(
                    f"barrier {key[1]} expects {expected} threads, {present} came "
                    f"({arrivals[0][2].name(0)})"
                )
            if present == next(iter(expected)):
                del self.waiting[key]
                released.setdefault(arrivals[0][0], {})[key] = arrivals
        return [self._merged(step, complete) for step, complete in released.items()]

    @staticmethod
    def _merged(step: Step, complete: dict[tuple[int, int], list]) -> Release:
        """Blocks that leave the same barrier, put together again."""
        nobody = complete[next(iter(complete))][0][2].nobody()
        leaving = Release(step, nobody, {}, {})
        for key, arrivals in complete.items():
            here = nobody
            for own, at, lanes, _ in arrivals:
                if own.control.waits:
                    here = here.union(lanes)
                    leaving.positions[at] = leaving.positions.get(at, nobody).union(lanes)
            leaving.waited = leaving.waited.union(here)
            if not all(own.control.waits for own, *_ in arrivals):
                leaving.reported[key] = here
        return leaving

    def describe(self, batch) -> list[str]:
        return [
            f"{lanes.count} threads ({lanes.name(0)}, ...) wait at barrier {number} "
            f"({batch.where(step)})"
            for (_, number), arrivals in self.waiting.items()
            for step, _, lanes, _ in arrivals
        ]
