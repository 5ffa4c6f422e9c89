"""The workspace kept between calls: whatever runs in the middle of it, nothing waits for ever."""

import gc
import sys
import threading

import pytest

from fastvlp.ops import release_workspace
from fastvlp.ops._core import workspace
from fastvlp.ops._core.workspace import Workspace


class Interrupted:
    """Lets the collector destroy a workspace between any two steps of the interpreter in it.

    As it may happen by itself: an allocation anywhere starts a collection, and that collects the
    graph of an earlier step.
    """

    def __init__(self):
        self.collections, self.left = 0, []

    def __call__(self, frame, event, argument):
        if frame.f_code.co_filename != workspace.__file__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            self.left.append(Workspace(8 + self.collections % 3))
            gc.collect(0)
        return self

    def collect(self, phase, info):
        if phase == "start" and self.left:
            self.collections += 1
            self.left.clear()


@pytest.fixture
def interrupted():
    trace = Interrupted()
    release_workspace()
    gc.callbacks.append(trace.collect)
    yield trace
    gc.callbacks.remove(trace.collect)
    release_workspace()


def test_a_collection_in_the_middle_does_not_deadlock(interrupted):
    found = []

    def use():
        sys.settrace(interrupted)
        try:
            first, second = Workspace(64), Workspace(32)
            first.release()
            del second
            third = Workspace(48)
            found.append(third.floats.numel())
            third.release()
            release_workspace()
            found.append(Workspace(16).floats.numel())
        finally:
            sys.settrace(None)

    thread = threading.Thread(target=use, daemon=True)
    thread.start()
    thread.join(timeout=900)
    assert not thread.is_alive(), "the workspace waits for itself"
    assert found == [48, 16]
    assert interrupted.collections > 100
    assert len(workspace._free) <= 1


def test_threads_share_no_buffer():
    release_workspace()
    wrong = []

    def use(number):
        for _ in range(300):
            own = Workspace(64 + number)
            own.floats.fill_(number)
            if not (own.floats == number).all():
                wrong.append(number)
            own.release()

    threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(workspace._free) == 1
    release_workspace()


def test_the_largest_buffer_stays_and_is_released_once():
    release_workspace()
    small, large = Workspace(8), Workspace(64)
    large.release()
    small.release()
    small.release()
    assert [buffer.numel() for buffer in workspace._free] == [64]
    too_long = Workspace(100)
    assert [buffer.numel() for buffer in workspace._free] == [64]
    too_long.release()
    assert too_long.floats is None
    assert [buffer.numel() for buffer in workspace._free] == [100]
    release_workspace()
