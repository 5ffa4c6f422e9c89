"""What instructions cost on a chip, and how long one block takes with its own dependences.

PTX is not what the chip executes, so costs are those of the instructions that it becomes:
`EXPANDED` names those that become several. Moves and address conversions cost nothing.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from math import prod

from _gpu.chips import Chip

# Clocks from issue to a result that can be read: 4 for arithmetic on Ampere and Hopper, about 20
# to 30 for special functions, shuffles and shared memory (Luo et al., as in chips).
LATENCY = {"fma": 4, "alu": 4, "imad": 5, "half2": 4, "convert": 6, "mufu": 20, "shuffle": 24,
           "shared": 29, "constant": 8}  # fmt: skip
MATRIX_LATENCY = 32
BARRIER = 20
# (mnemonic and a modifier that it has) -> results by pipe.
EXPANDED = (
    (("div", "full"), {"mufu": 1, "fma": 2, "alu": 2}),
    (("div", "approx"), {"mufu": 1, "fma": 1}),
    (("div", "rn"), {"mufu": 1, "fma": 7, "alu": 2}),
    (("div", ""), {"mufu": 1, "imad": 6, "alu": 8}),
    (("rem", ""), {"mufu": 1, "imad": 7, "alu": 8}),
    (("sqrt", "rn"), {"mufu": 1, "fma": 6, "alu": 2}),
    (("mad", "wide"), {"imad": 1}),
    (("mul", "wide"), {"imad": 1}),
    (("redux", ""), {"shuffle": 1}),
)
FREE = ("mov", "cvta")


@cache
def results(opcode: str, pipe: str) -> Mapping[str, float]:
    """Results a lane, by pipe, of one arithmetic PTX instruction; {} if it costs nothing."""
    parts = opcode.split(".")
    mnemonic, modifiers = parts[0], set(parts[1:])
    if mnemonic in FREE or pipe in ("control", "barrier", "memory", "tensor"):
        return {}
    for (name, modifier), cost in EXPANDED:
        if mnemonic == name and (not modifier or modifier in modifiers):
            return cost
    if modifiers & {"f16x2", "bf16x2", "f16", "bf16"} and pipe in ("fma", "alu", "imad"):
        if mnemonic in ("fma", "add", "sub", "mul"):
            return {"half2": 1}
    if modifiers & {"f32"} and mnemonic in ("add", "sub", "mul", "fma"):
        return {"fma": 1}
    if pipe == "convert":
        return {"convert": 1}
    wide = 2 if modifiers & {"s64", "u64", "b64", "f64"} and pipe in ("alu", "imad") else 1
    return {pipe if pipe in ("fma", "alu", "imad", "mufu", "shuffle") else "alu": wide}


def matrix_clocks(chip: Chip, opcode: str) -> float:
    """Clocks for which one matrix instruction takes all the matrix units of a multiprocessor."""
    parts = opcode.split(".")
    shape = next(part for part in parts if part[0] == "m" and part[1:2].isdigit())
    sizes = [int(n) for n in shape[1:].replace("n", " ").replace("k", " ").split()]
    kind = next(part for part in parts[parts.index(shape) + 1 :][1:] if part in _OPERANDS)
    asynchronous = parts[0] != "mma"
    rate = chip.tensor[_OPERANDS[kind]] * (1.0 if asynchronous else chip.mma_share)
    return 2 * prod(sizes) / rate


_OPERANDS = {"f16": "f16", "bf16": "bf16", "tf32": "tf32", "e4m3": "e4m3", "e5m2": "e4m3",
             "s8": "s8", "u8": "s8"}  # fmt: skip


def pipe_clocks(chip: Chip, instructions: Mapping[str, int], pipes: Mapping[str, str]) -> Counter:
    """Clocks of a multiprocessor, by pipe, for counts of instructions of warps by opcode."""
    clocks = Counter()
    for opcode, count in instructions.items():
        pipe = pipes[opcode]
        cost = results(opcode, pipe)
        for name, each in cost.items():
            clocks[name] += 32 * each * count / chip.lanes[name]
        if pipe == "tensor":
            clocks["tensor"] += matrix_clocks(chip, opcode) * count
        issued = sum(cost.values()) if cost else float(pipe in ("memory", "barrier", "tensor"))
        clocks["issue"] += issued * count / chip.schedulers
    return clocks


@dataclass(frozen=True)
class TracedStep:
    """An instruction of the traced warp: registers that it reads and writes are numbers."""

    opcode: str
    pipe: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    # Of a wait: how many groups may be left.
    left: int = 0


def block_clocks(chip: Chip, steps: Iterable[TracedStep], warps: int, memory_latency: int) -> float:
    """Clocks from the start of a block that is alone on its multiprocessor to its end.

    The traced warp stands for all: the warps of a block go in step and share the units of their
    scheduler. An instruction begins once its operands are there and its unit is free, whatever
    comes before it in the text (compilers move loads up), but not before the last barrier or wait.
    """
    share = max(1.0, warps / chip.schedulers)
    ready: dict[int, float] = {}
    free: Counter = Counter()
    groups: dict[str, list[float]] = {"cp.async": [], "wgmma": []}
    current: dict[str, float] = {"cp.async": 0.0, "wgmma": 0.0}
    floor = begun = ended = 0.0
    for step in steps:
        opcode = step.opcode
        own = set(step.writes) if step.pipe == "tensor" else ()
        start = max([floor, *(ready.get(r, 0.0) for r in step.reads if r not in own)])
        kind = _asynchronous(opcode)
        if kind and "commit" in opcode:
            groups[kind].append(current[kind])
            continue
        if kind and "wait" in opcode:
            done = groups[kind][: max(0, len(groups[kind]) - step.left)]
            floor = max([floor, *done[-1:]])
            continue
        if step.pipe == "barrier":
            floor = max(floor, begun) + (BARRIER if opcode.startswith(("bar", "barrier")) else 0)
            continue
        unit, taken, latency = _occupies(chip, step, share, memory_latency)
        start = max(start, free[unit]) if unit else start
        if unit:
            free[unit] = start + taken
        free["issue"] += share * bool(unit)
        begun = max(begun, start)
        done = start + taken + latency
        if kind:
            current[kind] = max(current[kind], done)
        for register in step.writes:
            ready[register] = start + taken if step.pipe == "tensor" and kind else done
        ended = max(ended, done)
    return max(ended, free["issue"])


def _asynchronous(opcode: str) -> str | None:
    return next((kind for kind in ("cp.async", "wgmma") if opcode.startswith(kind)), None)


def _occupies(chip, step, share, memory_latency) -> tuple[str | None, float, float]:
    """(unit, clocks for which the warps of a scheduler take it, latency after them)."""
    opcode, pipe = step.opcode, step.pipe
    if pipe == "tensor":
        # A warp's matmul goes to its scheduler's quarter; a warpgroup's to all four.
        if opcode.startswith("wgmma"):
            return "tensor", matrix_clocks(chip, opcode) * share, MATRIX_LATENCY
        return "tensor", matrix_clocks(chip, opcode) * chip.schedulers * share, MATRIX_LATENCY
    if pipe == "memory":
        if ".param" in opcode:
            return None, 0.0, LATENCY["constant"]
        # One pass over the banks a clock serves all warps of the multiprocessor.
        taken = chip.schedulers * share * _passes(opcode)
        if opcode.startswith("cp.async") or "global" in opcode:
            return "lsu", taken, float(memory_latency)
        return "lsu", taken, float(LATENCY["shared"])
    cost = results(opcode, pipe)
    if not cost:
        return None, 0.0, 0.0
    unit = max(cost, key=lambda name: cost[name] / chip.lanes[name])
    taken = 32 * cost[unit] / (chip.lanes[unit] / chip.schedulers)
    return unit, taken * share, float(LATENCY[unit])


def _passes(opcode: str) -> int:
    """Passes over the banks of one request without conflicts."""
    parts = opcode.split(".")
    if parts[0] == "cp":
        return 4
    count = next((int(part[1:]) for part in parts if part in ("x2", "x4", "v2", "v4")), 1)
    bits = next((int(part[1:]) for part in reversed(parts) if part[1:].isdigit()), 32)
    return max(1, count * (32 if parts[0].endswith("matrix") else bits) // 32)
