"""The performance model: a bound in milliseconds of a launch, from its counts and a chip's rates.

    time = launch + max(pipes of the busiest multiprocessor, its blocks' latency, L2, memory)

A launch of a size that cannot be executed is scaled from two that can: everything that a block does
is taken to be linear in the size (the trips of its loops are), and the number of blocks, their
registers and shared memory are those of the true launch, which is compiled but not executed. Where
the size is only the number of blocks, one that can be executed is enough.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from _gpu.chips import Chip
from _gpu.launches import Event, KernelLaunch, TorchOp, kernels
from _gpu.occupancy import occupancy
from _gpu.schedule import block_clocks, pipe_clocks

SECTOR = 32


@dataclass(frozen=True)
class Profile:
    """The average block of a launch on a chip.

    clocks: of its multiprocessor, by pipe. latency: clocks of a block that is alone. sector_bytes:
    between L1 and L2. touched: bytes that the launch as a whole reads, and those that it writes, as
    a share of the arguments'; up to 2 where it works in place.
    """

    clocks: dict[str, float]
    latency: float
    sector_bytes: float
    touched: float

    def towards(self, other: Profile, way: float) -> Profile:
        """The profile on the line from this (way 0) through `other` (way 1)."""

        def at(a: float, b: float) -> float:
            return max(0.0, a + (b - a) * way)

        pipes = {*self.clocks, *other.clocks}
        return Profile(
            {p: at(self.clocks.get(p, 0.0), other.clocks.get(p, 0.0)) for p in pipes},
            at(self.latency, other.latency),
            at(self.sector_bytes, other.sector_bytes),
            other.touched,
        )


def profile(chip: Chip, launch: KernelLaunch) -> Profile:
    """The profile of a launch that was executed; kept with it for each chip."""
    if chip.name not in launch.profiles:
        launch.profiles[chip.name] = _profile(chip, launch)
    return launch.profiles[chip.name]


def _profile(chip: Chip, launch: KernelLaunch) -> Profile:
    counts, blocks = launch.counts, launch.blocks
    moved = counts.distinct_bytes
    clocks = pipe_clocks(chip, counts.instructions, launch.pipes)
    sector_bytes = SECTOR * counts.l2_sectors.total()
    clocks["shared memory"] = (
        counts.wavefronts.total() + counts.tensor_shared_bytes / chip.shared_port
    )
    clocks["L1"] = SECTOR * counts.sectors.total() / chip.shared_port
    clocks["L2 port"] = sector_bytes / chip.l2_port
    again = sector_bytes > 2 * moved["any"]
    memory_latency = chip.l2_latency if again else chip.hbm_latency
    return Profile(
        {pipe: value / blocks for pipe, value in clocks.items()},
        block_clocks(chip, launch.steps, launch.binary.warps, memory_latency),
        sector_bytes / blocks,
        min(2.0, (moved.total() - moved["any"]) / max(1, launch.argument_bytes)),
    )


@dataclass(frozen=True)
class Bound:
    """A model's milliseconds of one launch, and what they are made of: `parts` by limit."""

    name: str
    ms: float
    parts: dict[str, float]
    blocks_per_sm: int = 0
    waves: float = 0.0

    @property
    def limited_by(self) -> str:
        return max(self.parts, key=self.parts.get)


def kernel_bound(chip: Chip, launch: KernelLaunch, block: Profile) -> Bound:
    """The bound of a launch whose average block has a profile."""
    binary = launch.binary
    held = occupancy(chip, binary.warps, binary.registers, binary.shared_bytes).blocks
    busiest = math.ceil(launch.blocks / chip.sms)
    parts = {}
    for pipe, clocks in block.clocks.items():
        ghz = chip.sustained_ghz if pipe == "tensor" else chip.boost_ghz
        parts[pipe] = busiest * clocks / ghz / 1e6
    parts["latency"] = math.ceil(busiest / held) * block.latency / chip.boost_ghz / 1e6
    total = block.sector_bytes * launch.blocks
    parts["L2"] = total / chip.l2_tb_s / 1e9
    compulsory = block.touched * launch.argument_bytes
    moved = memory_bytes(chip, total, compulsory, launch.blocks, held * chip.sms)
    parts["memory"] = moved / (chip.hbm_tb_s * chip.hbm_share) / 1e9
    ms = chip.launch_us / 1e3 + max(parts.values())
    return Bound(launch.kernel, ms, parts, held, launch.blocks / (held * chip.sms))


def memory_bytes(chip: Chip, total: float, compulsory: float, blocks: int, at_once: int) -> float:
    """Bytes from and to HBM of `total` between multiprocessors and L2.

    Where what is touched fits L2, each byte once. Otherwise blocks that run at once are taken for a
    square patch of the grid whose rows and columns each read the same, and every patch reads anew.
    """
    if compulsory <= chip.l2_bytes:
        return min(total, compulsory)
    waves = math.ceil(blocks / at_once)
    patch = min(blocks, at_once)
    return min(total, max(compulsory, waves * math.sqrt(patch) * total / blocks))


def torch_bound(chip: Chip, op: TorchOp) -> Bound:
    """The bound of an operation of torch: its bytes once, and matmuls at the vendor's share."""
    parts = {"memory": op.bytes / (chip.hbm_tb_s * chip.hbm_share) / 1e9}
    if op.flops:
        parts["vendor matmul"] = op.flops / (peak(chip, op.kind) * chip.vendor_share) / 1e9
    return Bound(f"torch {op.name}", chip.launch_us / 1e3 + max(parts.values()), parts)


def floor_bound(chip: Chip, op: TorchOp) -> Bound:
    """What nothing goes below: the bytes once, and matmuls at the peak that a kernel may reach."""
    parts = {"memory": op.bytes / (chip.hbm_tb_s * chip.hbm_share) / 1e9}
    if op.flops:
        parts["matmuls at peak"] = op.flops / peak(chip, op.kind) / 1e9
    return Bound(op.name, chip.launch_us / 1e3 + max(parts.values()), parts)


def peak(chip: Chip, kind: str) -> float:
    """TFLOP/s of matmuls of a type at the boost clock; fp32 without tensor cores."""
    rate = 2 * chip.lanes["fma"] if kind in ("f32", "f64") else chip.tensor[kind]
    return rate * chip.sms * chip.boost_ghz / 1e3


@dataclass(frozen=True)
class Executed:
    """What was executed at two sizes, smaller first, as `record` gives it; or at one, where a block
    does the same at every size."""

    sizes: tuple[int, ...]
    events: tuple[list[Event], ...]

    def __post_init__(self) -> None:
        small, *large = (
            {n: len(ls) for n, ls in kernels(events).items()} for events in self.events
        )
        if large and small != large[0]:
            raise ValueError(f"the launches at sizes {self.sizes} differ: {small} and {large[0]}")

    def profile(self, chip: Chip, launch: KernelLaunch, index: int, size: float) -> Profile:
        """The block of a kernel's launch number `index`, at another size.

        Raises ValueError where what was executed has other tiles than the launch.
        """
        launches = [kernels(events).get(launch.kernel, []) for events in self.events]
        if not all(launches):
            raise ValueError(f"{launch.kernel} runs at {size} and not at sizes {self.sizes}")
        # Of launches of several kinds, such as the last merge of all and those before, its own.
        alike = [[e for e in each if e.constants == launch.constants] for each in launches]
        launches = [
            (own or each)[index % len(own or each)]
            for own, each in zip(alike, launches, strict=True)
        ]
        tiles = [_tile(each) for each in (*launches, launch)]
        others = differences(tiles, (*self.sizes, size))
        if others:
            raise ValueError(
                f"{launch.kernel} has other tiles at sizes {self.sizes} than at {size}: {others}"
            )
        first, *second = (profile(chip, each) for each in launches)
        if not second:
            return first
        a, b = self.sizes
        return first.towards(second[0], (size - a) / (b - a))


def _tile(launch: KernelLaunch) -> dict[str, object]:
    """What a kernel is compiled for."""
    binary = launch.binary
    return {"warps": binary.warps, "shared bytes": binary.shared_bytes, **dict(launch.constants)}


def differences(
    tiles: Sequence[dict[str, object]], sizes: Sequence[float]
) -> dict[str, list[object]]:
    """The entries that are not the same in all tiles; but for those that are the size itself."""
    names = dict.fromkeys(name for tile in tiles for name in tile)
    found = {name: [tile.get(name) for tile in tiles] for name in names}
    return {
        name: values
        for name, values in found.items()
        if values != [values[0]] * len(values) and values != [*sizes]
    }


def bounds(chip: Chip, executed: Executed, true: Sequence[Event], size: float) -> list[Bound]:
    """The bounds of the launches `true` of a size, which were not executed."""
    found, seen = [], {}
    for event in true:
        if isinstance(event, TorchOp):
            found.append(torch_bound(chip, event))
            continue
        index = seen[event.kernel] = seen.get(event.kernel, -1) + 1
        found.append(kernel_bound(chip, event, executed.profile(chip, event, index, size)))
    return found
