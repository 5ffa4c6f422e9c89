"""mma.sync, ldmatrix, stmatrix and wgmma: their operands, around the functions of `matrix`."""

import numpy as np

from . import matrix
from .errors import ProgramError
from .forms import Decoder, form
from .lanes import WARP, Lanes
from .memory import SHARED_BASE
from .memory_instructions import address_reader, describe
from .observer import Access
from .syntax import Vector

_KINDS = ("f16", "bf16", "tf32", "s8", "u8")
_ACCUMULATORS = ("f32", "f16", "s32")


@form("mma.sync", pipe="tensor", scope="warp")
def _mma(d: Decoder):
    d.need("aligned")
    shape = d.modifiers.pop(0) if d.modifiers else ""
    d.need("row")
    d.need("col")
    saturate = bool(d.take("satfinite"))
    kinds = (d.need(*_ACCUMULATORS), d.need(*_KINDS), d.need(*_KINDS), d.need(*_ACCUMULATORS))
    a, b, c = d.fragment(1, (1, 2, 4)), d.fragment(2, (1, 2)), d.fragment(3, (2, 4))
    write = d.fragment_writer(0, (2, 4))

    def operation(lanes):
        fragments = [read(lanes).reshape(lanes.count // WARP, WARP, -1) for read in (a, b, c)]
        result = matrix.mma_sync(shape, kinds, *fragments, saturate=saturate)
        write(lanes, result.reshape(lanes.count, -1))

    return operation


def _matrix_form(d: Decoder) -> tuple[int, bool]:
    """(matrices, transposed) of ldmatrix and stmatrix."""
    d.need("sync")
    d.need("aligned")
    d.need("m8n8")
    count = int(d.need("x1", "x2", "x4")[1])
    transposed = bool(d.take("trans"))
    d.need("shared", "shared::cta")
    d.need("b16")
    return count, transposed


def _row_places(lanes: Lanes, addresses, count: int, what: str):
    """The lanes that give addresses of rows (8 for each matrix), and their places [W, rows]."""
    given = lanes.where(lanes.slots % WARP < 8 * count)
    chosen = np.broadcast_to(addresses, lanes.count).reshape(-1, WARP)[:, : 8 * count].reshape(-1)
    return given, chosen, lanes.batch.shared.locate(given, chosen, 16, what)


@form("ldmatrix", pipe="memory", scope="warp")
def _load_matrix(d: Decoder):
    count, transposed = _matrix_form(d)
    address, write = address_reader(d, d.operand(1), "shared"), d.fragment_writer(0, (count,))
    instruction, what = d.instruction, describe(d)

    def operation(lanes):
        given, addresses, places = _row_places(lanes, address(lanes), count, what)
        if lanes.batch.observers:
            lanes.batch.access(
                Access(instruction, given, "shared", "read", places.positions, addresses, 16)
            )
        rows = places.load(np.dtype(np.uint16), 8).reshape(-1, 8 * count, 8)
        registers = matrix.ldmatrix(rows, count, transposed)
        write(lanes, registers.reshape(lanes.count, count))

    return operation


@form("stmatrix", pipe="memory", scope="warp")
def _store_matrix(d: Decoder):
    count, transposed = _matrix_form(d)
    address, read = address_reader(d, d.operand(0), "shared"), d.fragment(1, (count,))
    instruction, what = d.instruction, describe(d)

    def operation(lanes):
        given, addresses, places = _row_places(lanes, address(lanes), count, what)
        rows = matrix.stmatrix(read(lanes).reshape(-1, WARP, count), transposed).reshape(-1, 8)
        if lanes.batch.observers:
            lanes.batch.access(
                Access(instruction, given, "shared", "write", places.positions, addresses, 16, rows)
            )
        places.store(rows)

    return operation


@form("wgmma.mma_async", pipe="tensor", scope="warpgroup")
def _wgmma(d: Decoder):
    """D = A B (+ D where scale-d is true), read from memory while the warpgroup goes on."""
    d.need("sync")
    d.need("aligned")
    shape = d.modifiers.pop(0) if d.modifiers else ""
    kinds = (d.need(*_ACCUMULATORS), d.need(*_KINDS), d.need(*_KINDS))
    columns, depth = (int(n) for n in shape[4:].split("k"))
    registers = columns * (2 if kinds[0] == "f16" else 4) // 8
    accumulators = d.fragment(0, (registers,))
    write = d.fragment_writer(0, (registers,))
    from_registers = isinstance(d.operand(1), Vector)
    fragment = d.fragment(1, (4,)) if from_registers else None
    descriptor_a = None if from_registers else d.source(1, "b64")
    descriptor_b, keep = d.source(2, "b64"), d.source(3, "pred")
    sign_a, sign_b = d.constant(4, (1, -1)), d.constant(5, (1, -1))
    halves = matrix.ELEMENT_BITS[kinds[1]] == 16
    transposed = [
        bool(d.constant(i, (0, 1))) for i in range(6, (7 if from_registers else 8) if halves else 6)
    ]
    transposed_b = transposed[-1] if halves else False
    transposed_a = transposed[0] if halves and not from_registers else False
    size = matrix.ELEMENT_BITS[kinds[1]] // 8
    instruction, what = d.instruction, describe(d)

    def operation(lanes):
        groups = lanes.warpgroups
        a = fragment(lanes)[groups] if from_registers else None
        reads = []
        if not from_registers:
            reads.append(
                _Operand(lanes, descriptor_a(lanes), 64, depth, size, transposed_a, what, True)
            )
        reads.append(
            _Operand(lanes, descriptor_b(lanes), columns, depth, size, transposed_b, what, False)
        )
        accesses = tuple(operand.access(instruction) for operand in reads)
        for access in accesses:
            lanes.batch.access(access)
        scale = np.broadcast_to(keep(lanes), lanes.count)[groups[:, 0]]

        def effect(chosen):
            some = chosen[groups[:, 0]]
            own = lanes if some.all() else lanes.where(chosen)
            left = a[some] if from_registers else reads[0].load(some)
            # Registers that are not added to may hold nothing yet.
            before = np.zeros((len(left), 4 * WARP, registers), np.uint32)
            if scale[some].any():
                before = accumulators(own)[own.warpgroups]
            result = matrix.wgmma(
                shape, kinds, left, reads[-1].load(some), before, scale[some],
                negate_a=sign_a < 0, negate_b=sign_b < 0,
            )  # fmt: skip
            ordered = np.empty((own.count, registers), np.uint32)
            ordered[own.warpgroups] = result
            write(own, ordered)

        lanes.batch.pending["wgmma"].start(lanes, accesses, effect)

    return operation


class _Operand:
    """A matrix in shared memory that a descriptor points to, one for each warpgroup."""

    def __init__(self, lanes, descriptors, rows, depth, size, transposed, what, is_a):
        self.lanes, self.is_a, self.transposed = lanes, is_a, transposed
        self.dtype = np.dtype(f"u{size}")
        groups = lanes.warpgroups
        values = np.broadcast_to(descriptors, lanes.count)[groups]
        if (values != values[:, :1]).any():
            raise ProgramError(f"{what}: descriptors differ within a warpgroup ({lanes.name(0)})")
        addresses = matrix.wgmma_descriptor_addresses(values[:, 0], rows, depth, size, transposed)
        self.per_row = 16 // size
        shared = lanes.batch.shared
        offsets = addresses - SHARED_BASE
        if offsets.min() < 0 or offsets.max() + size > shared.size:
            raise ProgramError(
                f"{what}: an operand reaches outside the {shared.size} bytes of shared memory "
                f"({lanes.name(int(groups[0, 0]))})"
            )
        # [G, rows, depth]
        self.positions = offsets + (lanes.block[groups[:, 0]] * shared.stride)[:, None, None]

    def load(self, some: np.ndarray) -> np.ndarray:
        table = self.lanes.batch.shared.buffer.bytes.view(self.dtype)
        return table[self.positions[some] // self.dtype.itemsize]

    def access(self, instruction) -> Access:
        """The read, 16 bytes at a time.

        Each warp reads its own rows of A. All four read B: two stand for them, so that whoever
        overwrites it must be ordered behind another warp at least.
        """
        groups = self.lanes.warpgroups
        if self.transposed:
            chunks = self.positions[:, :: self.per_row, :]
            row = np.arange(0, self.positions.shape[1], self.per_row)
        else:
            chunks = self.positions[:, :, :: self.per_row]
            row = np.arange(self.positions.shape[1])
        if self.is_a:
            owner = groups[:, (row // 16) * WARP][:, :, None]
            positions, rows = chunks, np.broadcast_to(owner, chunks.shape)
        else:
            positions = np.stack([chunks, chunks], axis=1)
            owner = groups[:, [0, WARP]][:, :, None, None]
            rows = np.broadcast_to(owner, positions.shape)
        flat = positions.reshape(-1)
        return Access(
            instruction, self.lanes, "shared", "read", flat, flat, 16, rows=rows.reshape(-1),
            asynchronous="wgmma", proxy="async",
        )  # fmt: skip


@form("wgmma.fence", pipe="barrier", scope="warpgroup")
def _wgmma_fence(d: Decoder):
    d.need("sync")
    d.need("aligned")
    return lambda lanes: lanes.batch.fenced("wgmma", lanes)


@form("wgmma.commit_group", pipe="control", scope="warpgroup")
def _wgmma_commit(d: Decoder):
    d.need("sync")
    d.need("aligned")
    return lambda lanes: lanes.batch.pending["wgmma"].commit(lanes)


@form("wgmma.wait_group", pipe="control", scope="warpgroup")
def _wgmma_wait(d: Decoder):
    d.need("sync")
    d.need("aligned")
    most = d.constant(0)
    return lambda lanes: lanes.batch.pending["wgmma"].wait(lanes, most)
