"""Tensor maps and copies of tiles by them: tensormap, cp.async.bulk.tensor.

Copies run in the async proxy. One to shared memory arrives at an mbarrier with its bytes: at once,
or under a late schedule when nobody can go on without it. One to global memory belongs to a group
of its thread; waiting for the group's reads (.read) waits for its writes too.
"""

from dataclasses import dataclass, replace

import numpy as np

from . import asynchronous
from .forms import Decoder, Source, form
from .lanes import WARP, Lanes
from .mbarrier_instructions import object_reader, told_where
from .memory import Places
from .memory_instructions import address_reader, by_space, describe
from .observer import Access

_MAP_BYTES = 128
_LINE = 16  # bytes that swizzling keeps together


@dataclass(frozen=True)
class _Rows:
    """Names of the lanes `rows`, for messages about their accesses."""

    lanes: Lanes
    rows: np.ndarray

    def name(self, position: int) -> str:
        return self.lanes.name(int(self.rows[position]))


@dataclass(frozen=True)
class _Tiles:
    """The boxes that some lanes copy with one tensor map.

    rows [B]: the positions of these lanes. inner: the places of all elements in shared memory;
    outer: in global memory those of the elements inside the tensor, and owner: their lanes.
    """

    tile: asynchronous.Tile
    rows: np.ndarray
    owner: np.ndarray
    outer: Places
    inner: Places

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(f"u{self.tile.element_bytes}")

    @property
    def copy_bytes(self) -> int:
        return self.tile.inside.shape[1] * self.tile.element_bytes

    def accesses(self, lanes: Lanes, instruction, outer: str, inner: str, waits: str) -> tuple:
        """Of global memory by elements, of shared memory by lines."""
        step = _LINE // self.tile.element_bytes
        lines = self.tile.shared_addresses[:, ::step]
        positions = self.inner.positions.reshape(self.tile.inside.shape)[:, ::step].ravel()
        owner = np.repeat(self.rows, lines.shape[1])
        common = dict(asynchronous=waits, proxy="async")
        width = self.tile.element_bytes
        made = [Access(instruction, lanes, "shared", inner, positions, lines.ravel(), _LINE,
                       rows=owner, **common)]  # fmt: skip
        if self.tile.inside.any():
            addresses = self.tile.global_addresses[self.tile.inside]
            made.append(Access(instruction, lanes, "global", outer, self.outer.positions,
                               addresses, width, rows=self.owner, **common))  # fmt: skip
        return tuple(made)

    def load(self) -> None:
        values = np.full(self.tile.inside.shape, self.tile.fill, self.dtype)
        if self.tile.inside.any():
            values[self.tile.inside] = self.outer.load(self.dtype, 1)[:, 0]
        self.inner.store(values.reshape(-1, 1))

    def store(self) -> None:
        if self.tile.inside.any():
            values = self.inner.load(self.dtype, 1).reshape(self.tile.inside.shape)
            self.outer.store(values[self.tile.inside][:, None])


def _map_reader(d: Decoder, operand) -> Source:
    """A function that reads each lane's tensor map [lanes, 128] through a generic address."""
    address = address_reader(d, replace(operand, coordinates=None), "generic")
    what = describe(d)

    def read(lanes):
        maps = np.empty((lanes.count, _MAP_BYTES), np.uint8)

        def part(some, addresses, memory):
            rows = np.searchsorted(lanes.slots, some.slots)
            half = _MAP_BYTES // 2  # to which maps are aligned
            for i in (0, 1):
                own = addresses + addresses.dtype.type(i * half)
                found = memory.locate(some, own, half, what)
                maps[rows, i * half : (i + 1) * half] = found.load_bytes(half)

        by_space("generic", part)(lanes, np.broadcast_to(address(lanes), lanes.count))
        return maps

    return read


def _tiles_reader(d: Decoder, operand, dimensions: int, target: Source, apart: bool = False):
    """A function that finds the boxes of all lanes, those with equal maps together or `apart`."""
    maps, what = _map_reader(d, operand), describe(d)
    if operand.coordinates is None or len(operand.coordinates.elements) != dimensions:
        raise d.error(f"{dimensions} coordinates are expected")
    coordinates = [d.reader(element, "s32") for element in operand.coordinates.elements]

    def read(lanes) -> list[_Tiles]:
        at = np.stack([np.broadcast_to(c(lanes), lanes.count) for c in coordinates], 1)
        shared = np.broadcast_to(target(lanes), lanes.count).astype(np.int64)
        distinct, which = maps(lanes), np.arange(lanes.count)
        if not apart:
            distinct, which = np.unique(distinct, axis=0, return_inverse=True)
        found = []
        for i, one in enumerate(distinct):
            rows = np.flatnonzero(which.ravel() == i)
            with told_where(what, lanes):
                tile = asynchronous.tile(one, at[rows], shared[rows])
            found.append(_place(lanes, tile, rows, what))
        return found

    return read


def _place(lanes: Lanes, tile: asynchronous.Tile, rows: np.ndarray, what: str) -> _Tiles:
    each = np.repeat(rows, tile.inside.shape[1])
    owner, batch = each[tile.inside.ravel()], lanes.batch
    outer = Places(np.empty(0, np.int64), [])
    if len(owner):
        addresses = tile.global_addresses[tile.inside].view(np.uint64)
        outer = batch.memory["global"].locate(
            _Rows(lanes, owner), addresses, tile.element_bytes, what
        )
    inner = batch.shared.locate_in(
        lanes, lanes.block[each], tile.shared_addresses.ravel(), tile.element_bytes, what, each
    )
    return _Tiles(tile, rows, owner, outer, inner)


@form("cp.async.bulk.tensor", pipe="memory")
def _copy(d: Decoder):
    dimensions = int(d.need("1d", "2d", "3d", "4d", "5d")[0])
    d.touches("global", 2)  # elements: only the map knows their size
    if d.take("shared::cta", "shared::cluster"):
        return _copy_to_shared(d, dimensions)
    return _copy_to_global(d, dimensions)


def _copy_to_shared(d: Decoder, dimensions: int):
    """[to], [map, {coordinates}], [mbarrier]"""
    d.need("global")
    d.take("tile")
    d.need("mbarrier::complete_tx::bytes")
    target = address_reader(d, d.operand(0), "shared")
    tiles, objects = _tiles_reader(d, d.operand(1), dimensions, target), object_reader(d, 2)
    instruction, what = d.instruction, describe(d)

    def operation(lanes):
        batch = lanes.batch
        with told_where(what, lanes):
            which = objects(lanes)
        for part in tiles(lanes):
            accesses = part.accesses(lanes, instruction, "read", "write", "mbarrier")
            for access in accesses:
                batch.access(access)

            def arrive(part=part, accesses=accesses):
                part.load()
                done = np.isin(np.arange(lanes.count), part.rows)
                for access in accesses:
                    batch.completed(access, done)
                own = which[part.rows]
                phases = batch.mbarriers.state.phase[own]
                batch.arrives(lanes.where(done), own, phases, copied=True)
                with told_where(what, lanes):
                    batch.mbarriers.state.complete(own, np.full(len(own), part.copy_bytes))

            if batch.schedule.late:
                batch.under_way.append(arrive)
            else:
                arrive()

    return operation


def _copy_to_global(d: Decoder, dimensions: int):
    """[map, {coordinates}], [from]"""
    d.need("global")
    d.need("shared::cta")
    d.take("tile")
    d.need("bulk_group")
    source = address_reader(d, d.operand(1), "shared")
    # Each lane waits for its own.
    tiles = _tiles_reader(d, d.operand(0), dimensions, source, apart=True)
    instruction = d.instruction

    def operation(lanes):
        parts = tiles(lanes)
        accesses = sum(
            (part.accesses(lanes, instruction, "write", "read", "bulk") for part in parts), ()
        )
        for access in accesses:
            lanes.batch.access(access)

        def effect(chosen):
            for part in parts:
                if chosen[part.rows[0]]:
                    part.store()

        lanes.batch.pending["bulk"].start(lanes, accesses, effect)

    return operation


@form("cp.async.bulk.commit_group", pipe="control")
def _commit(d: Decoder):
    return lambda lanes: lanes.batch.pending["bulk"].commit(lanes)


@form("cp.async.bulk.wait_group", pipe="control")
def _wait(d: Decoder):
    d.take("read")
    most = d.constant(0)
    return lambda lanes: lanes.batch.pending["bulk"].wait(lanes, most)


@form("tensormap.replace", pipe="memory")
def _replace(d: Decoder):
    """[map], {dimension,} value"""
    d.need("tile")
    field = d.need(*asynchronous.TENSOR_MAP.names)
    d.need("shared::cta")
    d.need("b1024")
    kind = d.need("b32", "b64")
    address = address_reader(d, d.operand(0), "shared")
    ordinal = d.constant(1) if d.has(2) else 0
    value = d.source(2 if d.has(2) else 1, kind)
    instruction, what = d.instruction, describe(d)

    def operation(lanes):
        addresses = np.broadcast_to(address(lanes), lanes.count)
        places = lanes.batch.shared.locate(lanes, addresses, _MAP_BYTES, what)
        maps = places.load_bytes(_MAP_BYTES)
        asynchronous.replace(maps, field, np.broadcast_to(value(lanes), lanes.count), ordinal)
        lanes.batch.access(
            Access(instruction, lanes, "shared", "write", places.positions, addresses, _MAP_BYTES,
                   maps)
        )  # fmt: skip
        places.store(maps)

    return operation


@form("tensormap.cp_fenceproxy", pipe="memory", scope="warp")
def _publish(d: Decoder):
    """[global], [shared], 128: a warp copies a map to where copies may use it."""
    for modifier in ("global", "shared::cta", "tensormap::generic", "release"):
        d.need(modifier)
    d.need("cta", "cluster", "gpu", "sys")
    d.need("sync")
    d.need("aligned")
    to = address_reader(d, d.operand(0), "global")
    source = address_reader(d, d.operand(1), "shared")
    d.constant(2, (_MAP_BYTES,))
    instruction, what = d.instruction, describe(d)

    def operation(lanes):
        first = lanes.where(lanes.slots % WARP == 0)
        own, target = (np.broadcast_to(a(first), first.count) for a in (source, to))
        held = first.batch.shared.locate(first, own, _MAP_BYTES, what)
        places = first.batch.memory["global"].locate(first, target, _MAP_BYTES, what)
        maps = held.load_bytes(_MAP_BYTES)
        for space, kind, found, addresses, values in (
            ("shared", "read", held, own, None), ("global", "write", places, target, maps),
        ):  # fmt: skip
            first.batch.access(
                Access(instruction, first, space, kind, found.positions, addresses, _MAP_BYTES,
                       values)
            )  # fmt: skip
        for rows, allocation, offsets in places.pieces:
            allocation.bytes[offsets[:, None] + np.arange(_MAP_BYTES)] = maps[rows]

    return operation


@form("fence.proxy.tensormap::generic", pipe="barrier")
def _fence(d: Decoder):
    """Maps that were written before are seen: memory here is sequentially consistent already."""
    d.need("acquire", "release")
    d.need("cta", "cluster", "gpu", "sys")
    if d.has(0):
        address_reader(d, d.operand(0), "generic")
        d.constant(1, (_MAP_BYTES,))
    return lambda lanes: None
