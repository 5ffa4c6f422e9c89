"""Matrix instructions of PTX as functions of arrays: mma.sync, ldmatrix, stmatrix, wgmma.

Registers are uint32. A warp's fragment is [32 lanes, registers]; leading axes count warps (W) or
warpgroups (G, four warps). Elements of fewer than 32 bits lie in a register lowest bits first.

In every fragment lane l belongs to group l // 4 and has place l % 4 in it. The group is a row of
A and of the accumulators and a column of B; the place picks neighbouring elements along the other
dimension; a register holds as many neighbours as fit into 32 bits.

What hardware rounds: products of the inputs are exact, the sum of an instruction's products and
the accumulator is taken in a wider format, a few products at a time, and cut off (rounded toward
zero) to float32; a float16 accumulator is rounded to nearest. Where and how often it cuts off
within one instruction depends on the chip and is not documented. The model takes the sum of one
instruction in float64 and rounds once: toward zero to float32, to nearest to float16. So float32
results are biased toward zero as on hardware, once per instruction along K rather than once per
few products. NaN results are the canonical NaN. tf32 inputs lose their low 13 bits.
"""

from __future__ import annotations

import re

import numpy as np

LANES = 32
# Rows that a warp holds of A and of the accumulators.
WARP_ROWS = 16
ELEMENT_BITS = {"f16": 16, "bf16": 16, "tf32": 32, "s8": 8, "u8": 8}
# Bytes of K that one instruction covers, whatever the elements.
_MMA_K_BYTES = (16, 32)
_WGMMA_K_BYTES = (32,)
_ACCUMULATORS = {"f16": ("f32", "f16"), "bf16": ("f32",), "tf32": ("f32",)}
_SWIZZLE_UNITS = {0: 1, 1: 8, 2: 4, 3: 2}
_UNIT = 16  # bytes; descriptors count, and swizzling moves, units of so many

Array = np.ndarray


def mma_sync(
    shape: str,
    kinds: tuple[str, str, str, str],
    a: Array,
    b: Array,
    c: Array,
    saturate: bool = False,
) -> Array:
    """D = A B + C of mma.sync.aligned.SHAPE.row.col.

    shape: "m16n8k16" and the like. kinds: element types of D, A, B and C as the instruction names
    them. a [W, 32, registers], b, c: uint32 fragments. saturate: .satfinite of integer products.
    Returns D's fragments [W, 32, registers of c].
    """
    rows, columns, depth = _shape(shape)
    out, kind, kind_b, kind_c = kinds
    _require_products(f"mma.sync {shape}", kinds, out == kind_c, _MMA_K_BYTES, depth)
    if (rows, columns) != (WARP_ROWS, 8):
        raise NotImplementedError(f"mma.sync: {shape} is not modelled, only m16n8")
    left, right = _operand_a(a, kind, 1, depth), _operand_b(b, kind_b, depth)
    before = _accumulators(c, kind_c, 1, columns)
    with np.errstate(invalid="ignore"):  # infinity less infinity
        total = left @ right + before
    return _accumulator_registers(total, out, 1, saturate)


def wgmma(
    shape: str,
    kinds: tuple[str, str, str],
    a: Array,
    b: Array,
    accumulators: Array,
    scale_d: Array | bool = True,
    negate_a: bool = False,
    negate_b: bool = False,
) -> Array:
    """D = A B + D of wgmma.mma_async.sync.aligned.SHAPE, A B alone where scale_d is false.

    shape: "m64nNk16" (k8 for tf32, k32 for bytes). kinds: element types of D, A and B. a: either
    register fragments [G, 128, registers] uint32, or the elements [G, 64, K] read from shared
    memory, as unsigned integers of their width. b [G, N, K]: the same, from shared memory only;
    `wgmma_descriptor_addresses` says where both lie. accumulators [G, 128, registers] uint32.
    scale_d: one value, or one per warpgroup. Returns D's fragments.
    """
    rows, columns, depth = _shape(shape)
    out, kind, kind_b = kinds
    _require_products(f"wgmma {shape}", kinds, True, _WGMMA_K_BYTES, depth)
    if rows != 64 or columns % 8 or not 8 <= columns <= 256:
        raise ValueError(f"wgmma: expected m64n8 to m64n256 in steps of 8, got {shape}")
    if a.shape[1] == 4 * LANES:
        left = _operand_a(a, kind, 4, depth)
    else:
        left = _values(_require_shape("a", a, (rows, depth)), kind)
    right = _values(_require_shape("b", b, (columns, depth)), kind_b).swapaxes(1, 2)
    before = _accumulators(accumulators, out, 4, columns)
    keep = np.broadcast_to(np.asarray(scale_d, bool), len(before))[:, None, None]
    with np.errstate(invalid="ignore"):  # infinity less infinity
        product = left @ right
        if negate_a != negate_b:
            product = -product
        total = np.where(keep, product + before, product)
    return _accumulator_registers(total, out, 4)


def ldmatrix(rows: Array, count: int, transposed: bool) -> Array:
    """ldmatrix.sync.aligned.m8n8.x{count}.b16, with .trans where `transposed`.

    rows [W, 8 * count, 8] uint16: the 16-byte rows at the addresses that the lanes give, in the
    order of the lanes. Returns the registers [W, 32, count] uint32.
    """
    matrices = _require_shape("rows", rows, (8 * count, 8)).reshape(-1, count, 8, 8)
    if transposed:
        matrices = matrices.swapaxes(2, 3)
    lanes = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, count, LANES)
    return np.ascontiguousarray(lanes.swapaxes(1, 2))


def stmatrix(registers: Array, transposed: bool) -> Array:
    """stmatrix.sync.aligned.m8n8.xN.b16, with .trans where `transposed`.

    registers [W, 32, N] uint32. Returns the 16-byte rows [W, 8 * N, 8] uint16 that go to the
    addresses that the lanes give, in the order of the lanes.
    """
    count = registers.shape[2]
    lanes = np.ascontiguousarray(registers.swapaxes(1, 2)).view(np.uint16)
    matrices = lanes.reshape(-1, count, 8, 8)
    if transposed:
        matrices = matrices.swapaxes(2, 3)
    return np.ascontiguousarray(matrices).reshape(-1, 8 * count, 8)


def wgmma_descriptor_addresses(
    descriptor: Array, rows: int, columns: int, element_bytes: int, transposed: bool
) -> Array:
    """Where the elements of an operand of wgmma lie in shared memory.

    descriptor [G] uint64. rows: the operand's extent along M or N; columns: along K. transposed:
    neighbours along M or N, not along K, are neighbours in memory. Returns byte addresses in
    the window of shared memory [G, rows, columns] int64.

    The descriptor's "leading" and "stride" offsets lead, in units of 16 bytes u and groups of
    eight along the other dimension:

        neighbours along  swizzle   leading                stride
        K                 none      to the next u          to the next 8 rows
        K                 32 - 128  unused                 to the next 8 rows
        M, N              none      to the next 8 columns  to the next u
        M, N              32 - 128  to the next span       to the next 8 columns
    """
    descriptor = np.asarray(descriptor, np.uint64)
    field = [
        (descriptor >> np.uint64(at) & np.uint64(0x3FFF)).astype(np.int64) for at in (0, 16, 32)
    ]
    start, leading, stride = (value[:, None, None] * _UNIT for value in field)
    if (descriptor >> np.uint64(49) & np.uint64(7)).any():
        raise NotImplementedError("wgmma: a descriptor with a base offset is not modelled")
    if transposed and element_bytes != 2:
        raise ValueError("wgmma: only operands of 16-bit elements can be transposed")
    mode = (descriptor >> np.uint64(62)).astype(np.int64)[:, None, None]
    units = np.vectorize(_SWIZZLE_UNITS.get, otypes=[np.int64])(mode)
    row, column = np.arange(rows)[:, None], np.arange(columns)
    along, across = (row, column) if transposed else (column, row)
    unit, rest = np.divmod(along * element_bytes, _UNIT)
    group, line = np.divmod(across, 8)
    if transposed:
        plain = unit * stride + group * leading
        swizzled = unit // units * leading + group * stride
    else:
        plain = unit * leading + group * stride
        swizzled = group * stride
    within = unit % units * _UNIT + line * units * _UNIT + rest
    address = start + within + np.where(mode == 0, plain, swizzled)
    return swizzle(address, units * _UNIT)


def swizzle(address: Array, span: Array | int) -> Array:
    """Where a byte lies in shared memory whose rows of `span` bytes (16: none) are swizzled.

    The index of a 16-byte unit within its row is XORed with the address's bits from 7 on.
    """
    return address ^ ((address >> 7) & (span // _UNIT - 1)) * _UNIT


def _shape(shape: str) -> tuple[int, int, int]:
    match = re.fullmatch(r"m(\d+)n(\d+)k(\d+)", shape)
    if match is None:
        raise ValueError(f"shape: expected mMnNkK, got {shape}")
    return tuple(map(int, match.groups()))


def _require_products(name, kinds, same_accumulators, depths, depth) -> None:
    out, a, b = kinds[:3]
    integers = {a, b} <= {"s8", "u8"}
    known = a in ELEMENT_BITS and (a == b or integers) and same_accumulators
    if not known or out not in (("s32",) if integers else _ACCUMULATORS[a]):
        raise NotImplementedError(f"{name}: the types {'.'.join(kinds)} are not modelled")
    if depth * ELEMENT_BITS[a] // 8 not in depths:
        raise NotImplementedError(f"{name}: this depth is not modelled for {a}")


def _require_shape(name: str, array: Array, shape: tuple[int, ...]) -> Array:
    if array.shape[1:] != shape:
        expected = ", ".join(map(str, shape))
        raise ValueError(f"{name}: expected shape [..., {expected}], got {array.shape}")
    return array


def _values(bits: Array, kind: str) -> Array:
    """float64 values of elements given as unsigned integers of their width."""
    if kind == "f16":
        return bits.view(np.float16).astype(np.float64)
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    if kind == "tf32":
        return (bits & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    if kind == "f32":
        return bits.view(np.float32).astype(np.float64)
    return bits.view({"s8": np.int8, "u8": np.uint8, "s32": np.int32}[kind]).astype(np.float64)


def _elements(registers: Array, kind: str) -> Array:
    """Values [..., registers, elements of one] of what registers [..., registers] hold."""
    bits = ELEMENT_BITS.get(kind, 32)
    parts = np.ascontiguousarray(registers).view(f"u{bits // 8}")
    return _values(parts, kind).reshape(*registers.shape, 32 // bits)


def _operand_a(registers: Array, kind: str, warps: int, depth: int) -> Array:
    """A [G, 16 * warps, depth]. The registers of a lane are, in turn, of its group's row and of the
    row eight below, first in the left half of the columns, then in the right one."""
    per = 32 // ELEMENT_BITS[kind]
    _require_shape("a", registers, (LANES * warps, depth // (2 * per)))
    values = _elements(registers, kind).reshape(-1, warps, 8, 4, depth // (4 * per), 2, per)
    return values.transpose(0, 1, 5, 2, 4, 3, 6).reshape(-1, WARP_ROWS * warps, depth)


def _operand_b(registers: Array, kind: str, depth: int) -> Array:
    """B [W, depth, 8]: of its group's column, first in the upper half, then in the lower one."""
    per = 32 // ELEMENT_BITS[kind]
    _require_shape("b", registers, (LANES, depth // (4 * per)))
    values = _elements(registers, kind).reshape(-1, 8, 4, depth // (4 * per), per)
    return values.transpose(0, 3, 2, 4, 1).reshape(-1, depth, 8)


def _accumulators(registers: Array, kind: str, warps: int, columns: int) -> Array:
    """The matrix [G, 16 * warps, columns]. For each eight columns a lane has two neighbours in its
    group's row, then two in the row eight below."""
    per = 32 // ELEMENT_BITS.get(kind, 32)
    _require_shape("accumulators", registers, (LANES * warps, columns // (2 * per)))
    values = _elements(registers, kind).reshape(-1, warps, 8, 4, columns // 8, 2, 2)
    return values.transpose(0, 1, 5, 2, 4, 3, 6).reshape(-1, WARP_ROWS * warps, columns)


def _accumulator_registers(matrix: Array, kind: str, warps: int, saturate: bool = False) -> Array:
    values = _rounded(matrix, kind, saturate).reshape(-1, warps, 2, 8, matrix.shape[2] // 8, 4, 2)
    lanes = np.ascontiguousarray(values.transpose(0, 1, 3, 5, 4, 2, 6))
    return lanes.reshape(len(matrix), LANES * warps, -1).view(np.uint32)


def _rounded(values: Array, kind: str, saturate: bool) -> Array:
    """float64 values as the bits of an accumulator."""
    if kind == "s32":
        low, high = -(2**31), 2**31 - 1
        if saturate:
            values = values.clip(low, high)
        return (values.astype(np.int64) & 0xFFFFFFFF).astype(np.uint32)
    with np.errstate(over="ignore"):
        near = values.astype(np.float16 if kind == "f16" else np.float32)
    if kind == "f16":
        return np.where(np.isnan(near), np.uint16(0x7FFF), near.view(np.uint16))
    away = np.isfinite(near) & (np.abs(near) > np.abs(values))
    bits = near.view(np.uint32) - away.astype(np.uint32)
    return np.where(np.isnan(near), np.uint32(0x7FFFFFFF), bits)
