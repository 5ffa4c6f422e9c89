"""cp.async: copies from global to shared memory that go on while the thread does."""

import numpy as np

from .forms import Decoder, form
from .lanes import Lanes
from .memory_instructions import address_reader, describe
from .observer import Access


@form("cp.async", pipe="memory")
def _copy(d: Decoder):
    """cp.async.{ca,cg}.shared.global [to], [from], size{, bytes that exist}: the rest is zero."""
    level = d.need("ca", "cg")
    d.need("shared", "shared::cta")
    d.need("global")
    d.take("L2::64B", "L2::128B", "L2::256B")
    size = d.constant(2, (16,) if level == "cg" else (4, 8, 16))
    to = address_reader(d, d.operand(0), "shared")
    source = address_reader(d, d.operand(1), "global")
    existing = d.source(3, "u32") if d.has(3) else None
    instruction, what = d.instruction, describe(d)

    def operation(lanes):
        batch = lanes.batch
        target = to(lanes)
        places = batch.shared.locate(lanes, target, size, what)
        count = np.full(lanes.count, size)
        if existing is not None:
            count = np.minimum(np.broadcast_to(existing(lanes), lanes.count), size)
        parts = _source_places(lanes, source(lanes), count, size, what)
        accesses = [
            Access(
                instruction, part, "global", "read", found.positions, address, bytes_each,
                rows=rows, asynchronous="cp.async",
            )
            for part, rows, found, address, bytes_each in parts
        ]  # fmt: skip
        accesses.append(
            Access(
                instruction, lanes, "shared", "write", places.positions, target, size,
                asynchronous="cp.async",
            )
        )  # fmt: skip
        for access in accesses:
            batch.access(access)

        def effect(chosen):
            values = np.zeros((lanes.count, size), np.uint8)
            for _, rows, found, _, bytes_each in parts:
                values[rows, :bytes_each] = found.load_bytes(bytes_each)
            table = batch.shared.buffer.bytes.reshape(-1, size)
            table[places.positions[chosen] // size] = values[chosen]

        batch.pending["cp.async"].start(lanes, tuple(accesses), effect)

    return operation


def _source_places(lanes: Lanes, address, count, size: int, what: str) -> list:
    """(lanes, their rows, places, addresses, bytes) for each number of bytes that is read."""
    parts = []
    for bytes_each in np.unique(count):
        if bytes_each:
            rows = np.flatnonzero(count == bytes_each)
            addresses = np.broadcast_to(address, lanes.count)[rows]
            found = lanes.batch.memory["global"].locate(
                lanes, addresses, int(bytes_each), what, align=size
            )
            parts.append((lanes, rows, found, addresses, int(bytes_each)))
    return parts


@form("cp.async.commit_group", pipe="control")
def _commit(d: Decoder):
    return lambda lanes: lanes.batch.pending["cp.async"].commit(lanes)


@form("cp.async.wait_group", pipe="control")
def _wait(d: Decoder):
    most = d.constant(0)
    return lambda lanes: lanes.batch.pending["cp.async"].wait(lanes, most)


@form("cp.async.wait_all", pipe="control")
def _wait_all(d: Decoder):
    def operation(lanes):
        lanes.batch.pending["cp.async"].commit(lanes)
        lanes.batch.pending["cp.async"].wait(lanes, 0)

    return operation


@form("fence.proxy", pipe="barrier")
def _proxy_fence(d: Decoder):
    """Orders ordinary accesses before asynchronous ones (and the other way round)."""
    d.need("async")
    d.take("global", "shared::cta", "shared::cluster")
    return lambda lanes: lanes.batch.fenced("proxy.async", lanes)
