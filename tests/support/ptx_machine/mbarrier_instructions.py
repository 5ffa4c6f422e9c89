"""mbarrier: objects in shared memory at which threads, and bytes that copies bring, arrive."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from .asynchronous import Barriers
from .control import PhaseWait
from .errors import ProgramError
from .forms import Decoder, Source, form
from .lanes import Lanes
from .memory_instructions import address_reader, describe

_SEMANTICS = ("relaxed", "acquire", "release")
_SCOPES = ("cta", "cluster")
_SPACES = ("shared", "shared::cta")


class SharedBarriers:
    """The objects of a batch. Their state lies in `state`, not in the bytes of shared memory."""

    def __init__(self) -> None:
        self.state = Barriers(0)
        self._numbers: dict[int, int] = {}

    def numbers(self, positions: np.ndarray, make: bool = False) -> np.ndarray:
        """The numbers in `state` of the objects at flat positions of shared memory."""
        found, inverse = np.unique(positions, return_inverse=True)
        if make:
            for position in found.tolist():
                self._numbers.setdefault(position, len(self._numbers))
            self.state.grow(len(self._numbers))
        known = [self._numbers.get(position, -1) for position in found.tolist()]
        if -1 in known:
            raise ValueError("expected an object that mbarrier.init has made")
        return np.array(known)[inverse]


@contextmanager
def told_where(what: str, lanes: Lanes) -> Iterator[None]:
    """A ValueError of the model is a fault of the program."""
    try:
        yield
    except ValueError as error:
        raise ProgramError(f"{what}: {error} ({lanes.name(0)})") from None


def object_reader(d: Decoder, i: int, make: bool = False) -> Source:
    """A function that gives the number of each lane's object."""
    address, what = address_reader(d, d.operand(i), "shared"), describe(d)

    def read(lanes):
        addresses = np.broadcast_to(address(lanes), lanes.count)
        positions = lanes.batch.shared.locate(lanes, addresses, 8, what).positions
        return lanes.batch.mbarriers.numbers(positions, make)

    return read


def _take_order(d: Decoder) -> None:
    d.take(*_SEMANTICS)
    d.take(*_SCOPES)
    d.need(*_SPACES)
    d.need("b64")


def _change(d: Decoder, objects: Source, change: Callable) -> Callable:
    """An operation change(state, objects, lanes) whose errors say where."""
    what = describe(d)

    def operation(lanes):
        with told_where(what, lanes):
            return change(lanes.batch.mbarriers.state, objects(lanes), lanes)

    return operation


@form("mbarrier.init", pipe="barrier")
def _init(d: Decoder):
    _take_order(d)
    objects, count = object_reader(d, 0, make=True), d.source(1, "u32")

    def change(state, which, lanes):
        state.init(which, _signed(count(lanes)))
        lanes.batch.initializes(which)

    return _change(d, objects, change)


@form("mbarrier.inval", pipe="barrier")
def _invalidate(d: Decoder):
    _take_order(d)
    return _change(d, object_reader(d, 0), lambda state, which, lanes: state.invalidate(which))


@form("mbarrier.expect_tx", pipe="barrier")
def _expect(d: Decoder):
    _take_order(d)
    objects, count = object_reader(d, 0), d.source(1, "u32")

    def change(state, which, lanes):
        state.expect(which, np.broadcast_to(_signed(count(lanes)), lanes.count))

    return _change(d, objects, change)


@form("mbarrier.arrive", pipe="barrier")
def _arrive(d: Decoder):
    """state, [object]{, count}: the state is the phase; with .expect_tx, count is in bytes."""
    expects = bool(d.take("expect_tx"))
    _take_order(d)
    write, objects = d.destination(0, "b64"), object_reader(d, 1)
    count = d.source(2, "u32") if expects or d.has(2) else None

    def change(state, which, lanes):
        many = np.broadcast_to(_signed(count(lanes)) if count else 1, lanes.count)
        phase = (state.arrive_expect if expects else state.arrive)(which, many)
        lanes.batch.arrives(lanes, which, phase)
        write(lanes, phase.astype(np.uint64))

    return _change(d, objects, change)


def _signed(values) -> np.ndarray:
    return np.asarray(values).astype(np.int64)


@form("mbarrier.test_wait", "mbarrier.try_wait", pipe="barrier")
def _wait(d: Decoder):
    """p, [object], state: whether that phase is over; .parity names the latest one of a parity.

    test_wait answers at once. try_wait may suspend the thread: here, until the answer is yes.
    """
    waits = d.instruction.opcode.startswith("mbarrier.try_wait")
    parity = bool(d.take("parity"))
    _take_order(d)
    write, objects = d.destination(0, "pred"), object_reader(d, 1)
    phase = d.source(2, "u32" if parity else "b64")
    if waits and d.has(3):
        d.source(3, "u32")  # for how long at most
    what = describe(d)

    def asked(lanes):
        return np.broadcast_to(_signed(phase(lanes)), lanes.count)

    def passed(lanes):
        with told_where(what, lanes):
            state, which = lanes.batch.mbarriers.state, objects(lanes)
            return (state.passed_parity if parity else state.passed)(which, asked(lanes))

    def finish(lanes, over):
        write(lanes, over)
        if over.any():
            some = lanes.where(over)
            which = objects(some)
            # A parity that is not the present phase's is that of the phase before.
            seen = some.batch.mbarriers.state.phase[which] - 1 if parity else asked(some)
            some.batch.passes(some, which, seen)

    if waits:
        return PhaseWait(passed, lambda lanes: finish(lanes, np.ones(lanes.count, bool)))
    return lambda lanes: finish(lanes, passed(lanes))
