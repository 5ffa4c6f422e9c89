"""Asynchronous copies of PTX as functions of arrays: tensor maps, tiles of them, and mbarriers.

A tensor map ("TMA descriptor") is 128 bytes that only the driver and the copy engine read. What
they hold is not documented, so the model has an encoding of its own; host code makes a map by
`encode_tiled`, as by cuTensorMapEncodeTiled, and kernels edit one by `replace`, the instruction
tensormap.replace. Modelled is the tiled mode without interleaving.

Dimensions are counted from the innermost, whose elements are neighbours in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .matrix import swizzle

MAX_DIMS = 5
# By the numbers that tensormap.replace takes.
ELEMENTS = (
    "u8", "u16", "u32", "s32", "u64", "s64", "f16", "f32", "f32.ftz", "f64", "bf16", "tf32",
    "tf32.ftz",
)  # fmt: skip
_ELEMENT_BYTES = {"u8": 1, "u16": 2, "f16": 2, "bf16": 2, "u64": 8, "s64": 8, "f64": 8}
_NAN = {"f16": 0x7FFF, "bf16": 0x7FFF, "f64": 0x7FFFFFFFFFFFFFFF}
_SWIZZLE_SPAN = {0: 16, 1: 32, 2: 64, 3: 128}

TENSOR_MAP = np.dtype(
    {
        "names": [
            "global_address", "global_stride", "global_dim", "box_dim", "element_stride", "rank",
            "elemtype", "interleave_layout", "swizzle_mode", "fill_mode",
        ],
        "formats": ["<u8", ("<u8", 4), ("<u4", 5), ("<u4", 5), ("<u4", 5), *["<u4"] * 5],
        "offsets": [0, 8, 40, 60, 80, 100, 104, 108, 112, 116],
        "itemsize": 128,
    }
)  # fmt: skip

Array = np.ndarray


class Tile(NamedTuple):
    """Where the elements of a box lie, for B copies of E elements each.

    global_addresses [B, E] int64, of bytes; valid where inside [B, E]. Elements outside the tensor
    are `fill` (an unsigned integer of the element's width) in shared memory, and a copy to global
    memory leaves them out. shared_addresses [B, E] int64. Whatever lies outside, a copy counts
    E * element_bytes bytes at its mbarrier.
    """

    element_bytes: int
    fill: int
    global_addresses: Array
    inside: Array
    shared_addresses: Array


def encode_tiled(
    address: int,
    element: str,
    sizes: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
    element_strides: Sequence[int] | None = None,
    swizzle_mode: int = 0,
    fill_nan: bool = False,
) -> Array:
    """A tensor map, [128] uint8, of the arguments of cuTensorMapEncodeTiled.

    address: of the tensor in bytes. element: one of ELEMENTS. sizes: elements per dimension.
    strides: bytes from one element to the next in dimensions 1 and up. box: elements that a copy
    covers, of which only each element_strides-th is taken (not along dimension 0). swizzle_mode:
    0 none, 1 to 3 for spans of 32, 64, 128 bytes. fill_nan: elements outside are NaN, not zero.
    """
    made = np.zeros(128, np.uint8)
    fields = made.view(TENSOR_MAP)[0]
    rank = len(sizes)
    fields["rank"] = rank - 1
    fields["global_address"], fields["elemtype"] = address, ELEMENTS.index(element)
    fields["global_dim"][:rank], fields["global_stride"][: rank - 1] = sizes, strides[: rank - 1]
    fields["box_dim"][:rank] = box
    fields["element_stride"][:rank] = element_strides or [1] * rank
    fields["swizzle_mode"], fields["fill_mode"] = swizzle_mode, fill_nan
    _require_valid(fields)
    return made


def encode_for_triton(
    address: int,
    element: str,
    element_bytes: int,
    swizzle_mode: int,
    block: Sequence[int],
    shape: Sequence[int],
    strides: Sequence[int],
    fill_nan: bool,
) -> Array:
    """A tensor map of what Triton knows of a descriptor: block, shape and strides in elements, the
    innermost dimension last. Its compiler numbers elements as in ELEMENTS."""
    return encode_tiled(
        address,
        element,
        shape[::-1],
        [stride * element_bytes for stride in strides[-2::-1]],
        block[::-1],
        swizzle_mode=swizzle_mode,
        fill_nan=fill_nan,
    )


def replace(maps: Array, field: str, values: Array, ordinal: int = 0) -> None:
    """tensormap.replace.tile.FIELD on `maps` [n, 128] uint8, in place.

    values [n]. ordinal: the dimension, of the fields that have one. "rank" takes the number of
    dimensions less one; global_stride 0 is the stride of dimension 1, in bytes.
    """
    if field not in TENSOR_MAP.names:
        raise NotImplementedError(f"tensormap.replace: the field {field} is not modelled")
    at = np.ascontiguousarray(maps).view(TENSOR_MAP)[:, 0]
    target = at[field] if at[field].ndim == 1 else at[field][:, ordinal]
    target[:] = values
    maps[:] = at[:, None].view(np.uint8)


def tile(tensor_map: Array, coordinates: Array, shared_address: Array) -> Tile:
    """The box at `coordinates` of a tensor: cp.async.bulk.tensor in the tiled mode.

    tensor_map: one, [128] uint8. coordinates [B, dimensions]: of the box's first element, signed.
    shared_address [B]: of the box in shared memory. Raises ValueError where hardware would fault.
    """
    fields = np.ascontiguousarray(tensor_map, np.uint8).view(TENSOR_MAP)[0]
    _require_valid(fields)
    rank, element = int(fields["rank"]) + 1, ELEMENTS[fields["elemtype"]]
    width, span = _ELEMENT_BYTES.get(element, 4), _SWIZZLE_SPAN[int(fields["swizzle_mode"])]
    start = np.asarray(coordinates).astype(np.int32).astype(np.int64)
    shared = np.asarray(shared_address, np.int64)
    if start.shape != (len(shared), rank):
        raise ValueError(f"coordinates: expected {rank} for each copy, got {start.shape[1:]}")
    if (shared % 128).any():
        raise ValueError("shared_address: expected a multiple of 128 bytes")

    box, steps = fields["box_dim"][:rank].astype(np.int64), _steps(fields, rank)
    taken = -(-box // steps)
    # [dimensions, E] offsets within the box, the innermost dimension fastest.
    offsets = np.indices(taken[::-1]).reshape(rank, -1)[::-1] * steps[:, None]
    at = start[:, :, None] + offsets
    sizes = fields["global_dim"][:rank].astype(np.int64)
    inside = ((at >= 0) & (at < sizes[:, None])).all(1)
    strides = np.concatenate([[width], fields["global_stride"][: rank - 1].astype(np.int64)])
    addresses = int(fields["global_address"]) + (at * strides[:, None]).sum(1)
    dense = np.arange(offsets.shape[1]) * width
    fill = _NAN.get(element, 0x7FFFFFFF) if fields["fill_mode"] else 0
    return Tile(width, fill, addresses, inside, swizzle(shared[:, None] + dense, span))


def _steps(fields, rank: int) -> Array:
    steps = fields["element_stride"][:rank].astype(np.int64)
    steps[0] = 1  # ignored
    return steps


def _require_valid(fields) -> None:
    """Raises ValueError where cuTensorMapEncodeTiled would refuse or copies be undefined."""
    if fields["interleave_layout"] or int(fields["swizzle_mode"]) not in _SWIZZLE_SPAN:
        raise NotImplementedError("tensor map: interleaving and other swizzling are not modelled")
    rank, element = int(fields["rank"]) + 1, ELEMENTS[fields["elemtype"]]
    width = _ELEMENT_BYTES.get(element, 4)
    box, inner = fields["box_dim"][:rank], int(fields["box_dim"][0]) * width
    span = _SWIZZLE_SPAN[int(fields["swizzle_mode"])]
    problems = {
        f"1 to {MAX_DIMS} dimensions": not 1 <= rank <= MAX_DIMS,
        "a global address that is a multiple of 16": fields["global_address"] % 16 != 0,
        "strides that are multiples of 16 bytes": (fields["global_stride"] % 16).any(),
        "box dimensions of 1 to 256": ((box < 1) | (box > 256)).any(),
        "an innermost box dimension of a multiple of 16 bytes": inner % 16 != 0,
        "an innermost box dimension as long as the swizzle's span": span > 16 and inner != span,
        "element strides of 1 to 8": not all(1 <= s <= 8 for s in fields["element_stride"][:rank]),
        "floating-point elements where NaN fills": bool(fields["fill_mode"]) and "f" not in element,
    }
    for expected, wrong in problems.items():
        if wrong:
            given = {name: fields[name].tolist() for name in TENSOR_MAP.names}
            raise ValueError(f"tensor map: expected {expected}, got {given}")


class Barriers:
    """State of many mbarrier objects, each of which alternates between two phases.

    A phase completes, and the next one begins, when nothing is pending: neither arrivals nor
    bytes that were announced. Methods take the objects as an array of indices that may repeat, as
    where several lanes of a warp arrive at one object; an instruction's effects on one object are
    added up before its phase is looked at.
    """

    MOST = 2**20 - 1  # arrivals, and bytes

    def __init__(self, objects: int) -> None:
        self.live = np.zeros(objects, bool)
        self.expected, self.pending, self.bytes, self.phase = np.zeros((4, objects), np.int64)

    def grow(self, objects: int) -> None:
        """Make room for so many objects in all."""
        for name in ("live", "expected", "pending", "bytes", "phase"):
            held = getattr(self, name)
            more = np.zeros(max(0, objects - len(held)), held.dtype)
            setattr(self, name, np.concatenate([held, more]))

    def init(self, which: Array, count: Array) -> None:
        """mbarrier.init: `count` arrivals complete a phase."""
        if np.any(count < 1) or np.any(count > self.MOST):
            raise ValueError(f"mbarrier.init: expected a count of 1 to {self.MOST}, got {count}")
        self.live[which] = True
        self.expected[which] = self.pending[which] = count
        self.bytes[which] = self.phase[which] = 0

    def invalidate(self, which: Array) -> None:
        """mbarrier.inval: the memory may be used for something else."""
        self._require_live(which, "inval")
        self.live[which] = False

    def arrive(self, which: Array, count: Array = 1) -> Array:
        """mbarrier.arrive. Returns the phase of each arrival, for `passed`."""
        self._require_live(which, "arrive")
        before = self.phase[which]
        np.subtract.at(self.pending, which, count)
        if (self.pending[which] < 0).any():
            raise ValueError("mbarrier.arrive: expected no more arrivals than mbarrier.init said")
        self._complete(which)
        return before

    def arrive_expect(self, which: Array, count: Array) -> Array:
        """mbarrier.arrive.expect_tx: announces `count` bytes, then arrives once."""
        self.expect(which, count)
        return self.arrive(which)

    def expect(self, which: Array, count: Array) -> None:
        """mbarrier.expect_tx: the present phase waits for `count` bytes more."""
        self._require_live(which, "expect_tx")
        np.add.at(self.bytes, which, count)
        self._require_bytes(which)
        self._complete(which)

    def complete(self, which: Array, count: Array) -> None:
        """mbarrier.complete_tx: `count` bytes have arrived, perhaps before they are announced."""
        self._require_live(which, "complete_tx")
        np.subtract.at(self.bytes, which, count)
        self._require_bytes(which)
        self._complete(which)

    def passed(self, which: Array, phase: Array) -> Array:
        """mbarrier.test_wait and try_wait: whether the phase that `arrive` returned is over."""
        self._require_live(which, "test_wait")
        return self.phase[which] > phase

    def passed_parity(self, which: Array, parity: Array) -> Array:
        """The same with .parity: whether the latest phase of this parity (0 or 1) is over.

        The phase before the first one has parity 1 and is over from the start.
        """
        self._require_live(which, "test_wait.parity")
        return (self.phase[which] & 1) != parity

    def _complete(self, which: Array) -> None:
        done = np.unique(np.asarray(which))
        done = done[(self.pending[done] == 0) & (self.bytes[done] == 0)]
        self.phase[done] += 1
        self.pending[done] = self.expected[done]

    def _require_live(self, which: Array, name: str) -> None:
        if not self.live[which].all():
            raise ValueError(f"mbarrier.{name}: expected an object that mbarrier.init has made")

    def _require_bytes(self, which: Array) -> None:
        if (np.abs(self.bytes[which]) > self.MOST).any():
            raise ValueError(f"mbarrier: expected at most {self.MOST} pending bytes")
