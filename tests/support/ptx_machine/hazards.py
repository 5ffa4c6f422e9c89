"""Finds what a GPU hides: accesses that are not ordered, unwritten reads, missing fences.

An observer with a shadow of shared and global memory. Within a block two accesses of a unit, at
least one a write, must be ordered by a barrier (see `happens_before`); between blocks only atomic
accesses may meet. Blocks that wait for one another by way of global memory are not understood:
their accesses are reported. Two threads that store equal values to one word of shared memory, as
Triton does where a layout holds values more than once, are no hazard.

Kinds of findings:
    shared race, global race    two threads of a block, not ordered by a barrier
    block conflict              two blocks, not both atomic
    conflicting stores          lanes of a warp store different values in one instruction
    unwritten                   a read, or an atomic change, of bytes that nothing has written
    pending                     an access to what an asynchronous operation still writes, or a
                                write to what one still reads
    proxy                       the async proxy reads what was written through the generic one,
                                with no fence.proxy.async in between
"""

import numpy as np

from .findings import Findings
from .happens_before import HappensBefore
from .lanes import WARP
from .observer import Access, Observer
from .register_hazards import RegisterHazards
from .shadow import Accesses, Shadow


def watchers(findings: Findings) -> tuple[Observer, ...]:
    """The observers that look for every kind of hazard in one launch."""
    return Hazards(findings), RegisterHazards(findings)


class Hazards(Observer):
    """Watches one launch; `findings` holds what was found."""

    def __init__(self, findings: Findings):
        self.findings = findings
        self.tick = 0
        self.shadows: dict[str, Shadow] = {}

    def batch_begins(self, batch) -> None:
        self.batch, layout = batch, batch.layout
        self.kernel = batch.program.kernel.name
        self.order = HappensBefore(layout)
        # What those knew who have reported at an incomplete barrier, by (block, barrier): rows
        # `known` and `fenced`.
        self.reported: dict[tuple[int, int], np.ndarray] = {}
        # What those knew who had arrived at an mbarrier object by the end of each of its phases.
        self.phases: dict[int, list[np.ndarray]] = {}
        threads = layout.warps_per_block * WARP
        # [slots]: the number of each thread in the grid, from 1 on.
        self.thread = (batch.numbers[layout.block] * threads + layout.thread + 1).astype(np.int32)
        units = batch.program.units
        shared = batch.shared
        self.shadows["shared"] = Shadow(shared.blocks * shared.stride, units["shared"], threads)
        if "global" not in self.shadows:
            self.shadows["global"] = Shadow(batch.memory["global"].size, units["global"], threads)

    def executes(self, step, lanes) -> None:
        self.tick += 1

    def synchronizes(self, step, lanes) -> None:
        self.tick += 1
        if step.instruction.opcode == "bar.warp.sync":
            self.order.warp_barrier(lanes, self.tick)
        else:
            self.order.barrier(lanes, self.tick)

    def reports(self, lanes, barriers: np.ndarray) -> None:
        self.tick += 1
        keys = np.stack([lanes.block, barriers.astype(np.int64)], 1)
        for block, barrier in np.unique(keys, axis=0).tolist():
            here = (keys == (block, barrier)).all(1)
            told = self.order.told(block, np.unique(lanes.warp[here]), self.tick)
            known = self.reported.get((block, barrier), -1)
            self.reported[block, barrier] = np.maximum(told, known)

    def hears(self, block: int, barrier: int, lanes) -> None:
        told = self.reported.pop((block, barrier))
        for warp in np.unique(lanes.warp):
            self.order.learns(block, warp, *told)

    def fences(self, fence: str, lanes) -> None:
        if fence == "proxy.async":
            self.order.fence(lanes, self.tick)

    def initializes(self, objects: np.ndarray) -> None:
        for number in np.unique(objects).tolist():
            self.phases[number] = []

    def arrives(self, lanes, objects: np.ndarray, phases: np.ndarray, copied: bool) -> None:
        self.tick += 1
        for number in np.unique(objects).tolist():
            here = objects == number
            block, warps = lanes.block[here][0], np.unique(lanes.warp[here])
            told = self.order.told(block, warps, self.tick)
            if copied:  # a copy's own writes need no fence
                told[1, warps] = self.tick
            known, phase = self.phases[number], phases[here][0]
            told = np.maximum(told, known[-1] if known else -1)
            known[phase:] = [told]

    def passes(self, lanes, objects: np.ndarray, phases: np.ndarray) -> None:
        self.tick += 1
        seen = np.stack([objects, phases, lanes.block, lanes.warp], 1)
        for number, phase, block, warp in np.unique(seen, axis=0).tolist():
            if phase >= 0:  # before the first phase nobody has arrived
                self.order.learns(block, warp, *self.phases[number][phase])

    def accesses(self, access: Access) -> None:
        if access.space not in self.shadows or not len(access.positions):
            return
        Check(self, access, self.shadows[access.space]).run()

    def completes(self, access: Access, done: np.ndarray) -> None:
        if access.space not in self.shadows or not len(access.positions):
            return
        self.tick += 1
        check = Check(self, access, self.shadows[access.space])
        check.complete(done)


class Check:
    """One access held against the shadow, then entered into it."""

    def __init__(self, hazards: Hazards, access: Access, shadow: Shadow):
        self.hazards, self.access, self.shadow = hazards, access, shadow
        self.unit, self.each = shadow.units(access.positions, access.width)
        lanes = access.lanes
        # [n]: for each position, the row of its lane.
        self.row = np.arange(lanes.count) if access.rows is None else access.rows
        self.slot = np.repeat(lanes.slots[self.row], self.each)
        self.thread = hazards.thread[self.slot]
        self.line = access.instruction.line

    def run(self) -> None:
        access, shadow, tick = self.access, self.shadow, self.hazards.tick
        self.check_pending()
        if access.kind != "write" and not self.exchanges():
            self.check_written()
        if access.kind == "read":
            if access.proxy == "async":
                self.check_proxy(shadow.writer, shadow.write_tick, shadow.write_line)
                self.check_proxy(shadow.atomics.last, shadow.atomics.tick, shadow.atomics.line)
        self.check_order(shadow.writer, shadow.write_tick, shadow.write_line, "wrote")
        if access.kind != "atomic":
            self.check_both(shadow.atomics, "changed")
        if access.kind != "read":
            self.check_both(shadow.reads, "read")
            self.check_same_instruction()
        if access.asynchronous:
            counts = shadow.read_by if access.kind == "read" else shadow.written_by
            np.add.at(counts, self.unit, 1)
        elif access.kind == "read":
            shadow.record_shared(shadow.reads, self.unit, self.thread, tick, self.line)
        else:
            self.enter_write(np.ones(len(self.unit), bool))

    def complete(self, done: np.ndarray) -> None:
        """An asynchronous access has happened, for lanes whose entry is true."""
        chosen = np.repeat(done[self.row], self.each)
        unit, access, shadow = self.unit[chosen], self.access, self.shadow
        counts = shadow.read_by if access.kind == "read" else shadow.written_by
        np.subtract.at(counts, unit, 1)
        if access.kind == "read":
            tick = self.hazards.tick
            shadow.record_shared(shadow.reads, unit, self.thread[chosen], tick, self.line)
        else:
            self.enter_write(chosen)

    def enter_write(self, chosen: np.ndarray) -> None:
        shadow, tick = self.shadow, self.hazards.tick
        unit, thread = self.unit[chosen], self.thread[chosen]
        if self.access.kind == "atomic":
            shadow.record_shared(shadow.atomics, unit, thread, tick, self.line)
        else:
            shadow.record_write(unit, thread, tick, self.line)
        if self.access.space == "global":
            memory = self.hazards.batch.memory["global"]
            positions = self.access.positions[chosen[:: self.each]]
            memory.mark_written(positions, self.access.width)

    # The checks.

    def check_pending(self) -> None:
        shadow = self.shadow
        busy = shadow.written_by[self.unit] > 0
        if self.access.kind != "read":
            busy |= shadow.read_by[self.unit] > 0
        if busy.any():
            self.report(
                "pending", busy, 0,
                lambda i: "before an asynchronous operation on the same bytes was waited for",
            )  # fmt: skip

    def check_written(self) -> None:
        if self.access.space == "shared":
            shadow, unit = self.shadow, self.unit
            fresh = (shadow.writer[unit] == 0) & (shadow.atomics.last[unit] == 0)
            fresh &= shadow.written_by[unit] == 0
        else:
            memory = self.hazards.batch.memory["global"]
            fresh = memory.unwritten(self.access.positions, self.access.width)
            if fresh is None:
                return
            fresh = np.repeat(fresh, self.each)
        if fresh.any():
            self.report("unwritten", fresh, 0, lambda i: "that nothing has written")

    def check_both(self, table: Accesses, verb: str) -> None:
        self.check_order(table.last, table.tick, table.line, verb)
        self.check_order(table.other, table.other_tick, None, verb)

    def exchanges(self) -> bool:
        """Whether what is stored depends on nothing that is read: atom.exch may be the first."""
        return ".exch" in self.access.instruction.opcode

    def check_order(self, who, ticks, lines, verb: str) -> None:
        shadow, hazards = self.shadow, self.hazards
        prior = who[self.unit]
        candidates = np.flatnonzero((prior > 0) & (prior != self.thread))
        if not len(candidates):
            return
        unit, prior, thread = self.unit[candidates], prior[candidates], self.thread[candidates]
        slot, layout = self.slot[candidates], hazards.batch.layout
        foreign = shadow.block_of(prior) != shadow.block_of(thread)
        prior_warp = (prior - 1) % shadow.threads // WARP
        known = hazards.order.known[layout.block[slot], layout.warp[slot], prior_warp]
        bad = foreign | (ticks[unit] > known)
        if bad.any() and verb == "wrote" and self.access.kind != "read":
            bad &= ~self.stores_the_same()[candidates]
        if not bad.any():
            return
        for kind, some in (("block conflict", bad & foreign), ("race", bad & ~foreign)):
            if some.any():
                chosen = np.zeros(len(self.unit), bool)
                chosen[candidates[some]] = True
                name = kind if kind == "block conflict" else f"{self.access.space} race"
                line = 0 if lines is None else int(lines[self.unit[np.argmax(chosen)]])
                self.report(
                    name, chosen, line, lambda i, line=line: self.earlier(who, i, verb, line)
                )

    def earlier(self, who, i: int, verb: str, line: int) -> str:
        thread = int(who[self.unit[i]]) - 1
        block, rest = divmod(thread, self.shadow.threads)
        grid = self.hazards.batch.grid
        at = (block % grid[0], block // grid[0] % grid[1], block // (grid[0] * grid[1]))
        where = f" in line {line}" if line else ""
        return (
            f"that block {at}, warp {rest // WARP}, lane {rest % WARP} {verb}{where}, "
            "with nothing to order the two"
        )

    def check_proxy(self, who, ticks, lines) -> None:
        """Only what the generic proxy wrote: the async proxy's own writes carry no line."""
        shadow, layout, order = self.shadow, self.hazards.batch.layout, self.hazards.order
        prior = who[self.unit]
        warp = (prior - 1) % shadow.threads // WARP
        fenced = order.fenced[layout.block[self.slot], layout.warp[self.slot], warp]
        bad = (prior > 0) & (ticks[self.unit] > fenced)
        if bad.any():
            line = int(lines[self.unit[np.argmax(bad)]])
            self.report(
                "proxy", bad, line,
                lambda i: f"through the async proxy that line {line} wrote through the generic "
                "one, with no fence.proxy.async in between",
            )  # fmt: skip

    def check_same_instruction(self) -> None:
        """Several lanes that write one unit at once."""
        if self.access.kind == "atomic" or len(self.unit) < 2:
            return
        shadow = self.shadow
        position = np.arange(len(self.unit))
        # Scratch: the position of the last lane that writes each unit.
        before = shadow.writer[self.unit]
        shadow.writer[self.unit] = position
        last = shadow.writer[self.unit]
        shadow.writer[self.unit] = before
        shared = last != position
        if not shared.any():
            return
        values = self.unit_values()
        differ = shared & (True if values is None else (values != values[last]).any(1))
        blocks = shadow.block_of(self.thread) != shadow.block_of(self.thread[last])
        warps = shadow.warp_of(self.thread) != shadow.warp_of(self.thread[last])
        if self.access.space == "global":
            differ |= shared & warps
        for kind, some in (
            ("conflicting stores", differ & ~warps),
            ("block conflict", differ & blocks),
            (f"{self.access.space} race", differ & warps & ~blocks),
        ):
            if some.any():
                self.report(kind, some, self.line, lambda i: "that other lanes write at once")

    def stores_the_same(self) -> np.ndarray:
        """[units]: whether shared memory holds what is written to it already."""
        values = self.unit_values()
        if values is None or self.access.space != "shared":
            return np.zeros(len(self.unit), bool)
        unit = self.shadow.unit
        memory = self.hazards.batch.shared.buffer.bytes.reshape(-1, unit)
        return (memory[self.unit] == values).all(1)

    def unit_values(self) -> np.ndarray | None:
        """[units, bytes]: what is written to each, where that is known."""
        if self.access.values is None:
            return None
        data = np.ascontiguousarray(self.access.values).view(np.uint8)
        return data.reshape(len(self.unit), -1)

    def report(self, kind: str, chosen: np.ndarray, line: int, why) -> None:
        access = self.access
        place = (access.instruction.line, line)

        def text() -> str:
            i = int(np.argmax(chosen))
            verb = {"read": "reads", "write": "writes", "atomic": "changes"}[access.kind]
            name = self.hazards.batch.layout.name(int(self.slot[i]))
            address = int(access.addresses[i // self.each])
            return (
                f"{self.hazards.kernel}, line {access.instruction.line}, "
                f"{access.instruction.text!r}: {name} {verb} {access.space} memory at "
                f"{address:#x} {why(i)}"
            )

        self.hazards.findings.add(kind, place, int(chosen.sum()), text)
