"""Instructions that decide which threads run next: branches, exits and barriers."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .forms import Decoder, Source, form
from .lanes import Lanes
from .syntax import Symbol


@dataclass(frozen=True)
class Branch:
    target: int


@dataclass(frozen=True)
class Exit:
    pass


@dataclass(frozen=True)
class Barrier:
    """A barrier of the block. `count` is the number of threads it expects, None for all; with
    `waits` false a thread only reports its arrival."""

    number: Source
    count: Source | None
    waits: bool


@dataclass(frozen=True)
class WarpBarrier:
    """Memory accesses of the lanes of a warp before it are ordered before those behind it."""


@dataclass(frozen=True)
class PhaseWait:
    """Lanes wait until `passed` is true of them [lanes], which changes nothing; then `finish`."""

    passed: Callable[[Lanes], np.ndarray]
    finish: Callable[[Lanes], None]


Control = Branch | Exit | Barrier | WarpBarrier | PhaseWait


@form("bra", pipe="control")
def _branch(d: Decoder):
    d.take("uni")
    label = d.operand(0)
    if not isinstance(label, Symbol) or label.name not in d.kernel.labels:
        raise d.error("an unknown label")
    return Branch(d.kernel.labels[label.name])


@form("ret", "exit", pipe="control")
def _exit(d: Decoder):
    d.take("uni")
    return Exit()


def _threads(d: Decoder, i: int) -> Source | None:
    return d.source(i, "u32") if d.has(i) else None


@form("bar", "barrier", pipe="barrier", scope="warp")
def _barrier(d: Decoder):
    """bar.sync a{, b}: all warps of the block, or b threads, meet at barrier a."""
    d.take("cta")
    mode = d.need("sync", "arrive")
    if d.instruction.mnemonic == "barrier" and not d.take("aligned"):
        raise d.error("a barrier without .aligned")
    number, count = d.source(0, "u32"), _threads(d, 1)
    if mode == "arrive" and count is None:
        raise d.error("bar.arrive needs a thread count")
    return Barrier(number, count, mode == "sync")


@form("bar.warp.sync", pipe="barrier", scope="warp")
def _warp_barrier(d: Decoder):
    if d.constant(0) & 0xFFFFFFFF != 0xFFFFFFFF:
        raise d.error("a membership mask of a part of the warp")
    return WarpBarrier()


@form("membar", "fence", pipe="barrier")
def _fence(d: Decoder):
    """Fences of ordinary accesses: memory here is sequentially consistent already."""
    if d.instruction.mnemonic == "fence":
        d.need("sc", "acq_rel")
        d.need("cta", "cluster", "gpu", "sys")
    else:
        d.need("cta", "gl", "sys")
    return lambda lanes: None


@form("nanosleep", pipe="control")
def _sleep(d: Decoder):
    d.need("u32")
    d.source(0, "u32")
    return lambda lanes: None
