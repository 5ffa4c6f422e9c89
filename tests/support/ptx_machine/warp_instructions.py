"""Exchange between the lanes of a warp: shfl, vote, redux, match, activemask, elect."""

import numpy as np

from .errors import ProgramError
from .forms import Decoder, form
from .lanes import WARP, Lanes
from .memory_instructions import describe
from .syntax import Immediate

_LANE = np.arange(WARP)


def take_members(d: Decoder, i: int):
    """The membership mask. Only whole warps are implemented: -1, or a register that holds it."""
    value = d.operand(i)
    if isinstance(value, Immediate) and value.value & 0xFFFFFFFF != 0xFFFFFFFF:
        raise d.error("a membership mask of a part of the warp")
    read, what = d.reader(value, "b32"), describe(d)

    def check(lanes: Lanes) -> None:
        if (read(lanes) != np.uint32(0xFFFFFFFF)).any():
            raise ProgramError(f"{what}: a membership mask of a part of the warp")

    return (lambda lanes: None) if isinstance(value, Immediate) else check


@form("shfl.sync", pipe="shuffle", scope="warp")
def _shuffle(d: Decoder):
    """d|p = a of another lane; p says whether that lane lies in the segment."""
    mode = d.need("up", "down", "bfly", "idx")
    kind = d.need("b32")
    write, write_valid = d.pair(0, kind)
    a, b, c = (d.source(i, "b32") for i in (1, 2, 3))
    check = take_members(d, 4)

    def operation(lanes):
        check(lanes)
        warps = lanes.count // WARP
        shape = (warps, WARP)
        value = np.broadcast_to(a(lanes), lanes.count).reshape(shape)
        amount = np.broadcast_to(b(lanes), lanes.count).reshape(shape).astype(np.int64) & 31
        limits = np.broadcast_to(c(lanes), lanes.count).reshape(shape).astype(np.int64)
        clamp, segment = limits & 31, limits >> 8 & 31
        last = (_LANE & segment) | (clamp & ~segment)
        if mode == "up":
            source = _LANE - amount
            valid = source >= last
        elif mode == "down":
            source = _LANE + amount
            valid = source <= last
        elif mode == "bfly":
            source = _LANE ^ amount
            valid = source <= last
        else:
            source = (_LANE & segment) | (amount & ~segment)
            valid = source <= last
        source = np.where(valid, source, _LANE)
        write(lanes, np.take_along_axis(value, source, axis=1).reshape(-1))
        if write_valid is not None:
            write_valid(lanes, valid.reshape(-1))

    return operation


@form("vote.sync", pipe="alu", scope="warp")
def _vote(d: Decoder):
    mode = d.need("all", "any", "uni", "ballot")
    kind = d.need("b32" if mode == "ballot" else "pred")
    a, write = d.source(1, "pred"), d.destination(0, kind)
    check = take_members(d, 2)

    def operation(lanes):
        check(lanes)
        value = np.broadcast_to(a(lanes), lanes.count).reshape(-1, WARP)
        if mode == "ballot":
            bits = value.astype(np.uint32) << _LANE.astype(np.uint32)
            result = np.bitwise_or.reduce(bits, axis=1)
        elif mode == "uni":
            result = value.all(1) | ~value.any(1)
        else:
            result = value.all(1) if mode == "all" else value.any(1)
        write(lanes, np.repeat(result, WARP))

    return operation


@form("redux.sync", pipe="shuffle", scope="warp")
def _reduce(d: Decoder):
    name = d.need("add", "min", "max", "and", "or", "xor")
    kind = d.need(*(("u32", "s32") if name in ("add", "min", "max") else ("b32",)))
    a, write = d.source(1, kind), d.destination(0, kind)
    check = take_members(d, 2)
    function = {
        "add": np.add, "min": np.minimum, "max": np.maximum,
        "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    }[name]  # fmt: skip

    def operation(lanes):
        check(lanes)
        value = np.broadcast_to(a(lanes), lanes.count).reshape(-1, WARP)
        result = function.reduce(value, axis=1, dtype=value.dtype)
        write(lanes, np.repeat(result, WARP))

    return operation


@form("match", pipe="alu", scope="warp")
def _match(d: Decoder):
    """The lanes that hold the same value (.any), or all lanes if all do (.all)."""
    mode = d.need("any", "all")
    d.need("sync")
    kind = d.need("b32", "b64")
    write, write_all = d.pair(0, "b32")
    a = d.source(1, kind)
    check = take_members(d, 2)
    if write_all is not None and mode == "any":
        raise d.error("match.any has no predicate")

    def operation(lanes):
        check(lanes)
        value = np.broadcast_to(a(lanes), lanes.count).reshape(-1, WARP)
        same = value[:, :, None] == value[:, None, :]
        bits = same.astype(np.uint32) << _LANE.astype(np.uint32)
        masks = np.bitwise_or.reduce(bits, axis=2)
        if mode == "all":
            masks = np.where(masks == np.uint32(0xFFFFFFFF), masks, np.uint32(0))
        write(lanes, masks.reshape(-1))
        if write_all is not None:
            write_all(lanes, (masks != 0).reshape(-1))

    return operation


@form("activemask", pipe="alu")
def _active(d: Decoder):
    write = d.destination(0, d.need("b32"))

    def operation(lanes):
        number = lanes.slots // WARP
        starts = lanes.warp_starts
        bits = np.uint32(1) << (lanes.slots % WARP).astype(np.uint32)
        masks = np.bitwise_or.reduceat(bits, starts)
        write(lanes, masks[np.searchsorted(number[starts], number)])

    return operation


@form("elect.sync", pipe="alu", scope="warp")
def _elect(d: Decoder):
    """d|p: the lowest lane, and whether this is it."""
    write, write_elected = d.pair(0, "b32")
    check = take_members(d, 1)

    def operation(lanes):
        check(lanes)
        write(lanes, np.zeros(lanes.count, np.uint32))
        if write_elected is not None:
            write_elected(lanes, np.broadcast_to(_LANE == 0, (lanes.count // WARP, WARP)).ravel())

    return operation
