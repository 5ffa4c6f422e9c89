"""How many blocks of a kernel a multiprocessor holds: the rules of CUDA's occupancy calculator."""

from dataclasses import dataclass

from _gpu.chips import Chip

REGISTER_UNIT = 256  # registers of a warp are given out in units of so many
SHARED_UNIT = 128  # bytes
SYSTEM_SHARED = 1024  # bytes of shared memory that the system takes for each block
WARP_UNIT = 4  # warps of a block, rounded up to one for each scheduler, share the register file


@dataclass(frozen=True)
class Occupancy:
    """blocks: at once on a multiprocessor. limits: by each of the resources."""

    blocks: int
    limits: dict[str, int]

    @property
    def limited_by(self) -> str:
        return min(self.limits, key=self.limits.get)


def occupancy(chip: Chip, warps: int, registers: int, shared_bytes: int) -> Occupancy:
    """The occupancy of blocks of `warps` warps with `registers` for each thread.

    Raises ValueError where not even one block fits.
    """
    by_warp = _up(registers * 32, REGISTER_UNIT)
    most_warps = chip.registers // by_warp // WARP_UNIT * WARP_UNIT if registers else chip.warps
    shared = _up(shared_bytes, SHARED_UNIT) + SYSTEM_SHARED
    fits = shared_bytes <= chip.block_shared_bytes
    limits = {
        "blocks": chip.blocks,
        "warps": chip.warps // warps,
        "registers": most_warps // warps,
        "shared memory": chip.shared_bytes // shared if fits else 0,
    }
    found = Occupancy(min(limits.values()), limits)
    if found.blocks < 1:
        raise ValueError(
            f"a block of {warps} warps with {registers} registers a thread and {shared_bytes} "
            f"bytes of shared memory does not fit {chip.name}: too much for {found.limited_by}"
        )
    return found


def l1_share(chip: Chip, warps: int, registers: int, shared_bytes: int) -> int:
    """Bytes of L1 for each block of those that a multiprocessor holds."""
    blocks = occupancy(chip, warps, registers, shared_bytes).blocks
    return chip.l1_bytes // blocks - _up(shared_bytes, SHARED_UNIT) - SYSTEM_SHARED


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
