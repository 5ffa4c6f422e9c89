"""Milliseconds of several calls that take turns."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

# To standard error, so that tables on standard output can be piped into a file.
console = Console(stderr=True)
# Least seconds between two plain lines about the same work.
LINES_EVERY_S = 10.0

Call = Callable[[], Mapping[str, torch.Tensor] | None]


class CpuClock:
    """Wall time of one call in milliseconds."""

    def __call__(self, call: Call) -> float:
        start = time.perf_counter()
        result = call()
        elapsed = time.perf_counter() - start
        # Only now: freeing the results is the caller's cost, not the op's.
        del result
        return elapsed * 1e3


class CudaClock:
    """Device time of one call in milliseconds, by events, and the host's time to launch it.

    An event on an idle stream passes at once, and what follows it then waits for the host, so that
    a call of short kernels would be timed at the speed of their launches. The device therefore
    spins until the host has launched the whole call, whose kernels then run back to back. A call
    that itself waits for the device cannot be launched ahead: its time has the host's part in it.

    `cold`: whether L2 is overwritten before each call. `launch_ms` is the
    host's time of the last call; a step that launches faster than its kernels run does not see it.
    """

    SHORTEST_SPIN, LONGEST_SPIN = 1 << 20, 1 << 28  # cycles: about 0.5 ms and 0.14 s
    GROWTH = 4

    def __init__(self, cold: bool = True) -> None:
        self.launch_ms: float | None = None
        self._spins: dict[Call, int] = {}
        self._scrub = None
        if cold:
            size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
            self._scrub = torch.empty(2 * max(size, 1 << 25), dtype=torch.int8, device="cuda")

    def __call__(self, call: Call) -> float:
        """Times the call, again behind a longer spin as long as the host comes too late."""
        spin = self._spins.get(call, self.SHORTEST_SPIN)
        waits = spin > self.LONGEST_SPIN
        while True:
            elapsed, is_ahead = self._time(call, self.SHORTEST_SPIN if waits else spin)
            if is_ahead or waits:
                break
            spin *= self.GROWTH
            waits = spin > self.LONGEST_SPIN
        self._spins[call] = spin
        return elapsed

    def _time(self, call: Call, spin: int) -> tuple[float, bool]:
        """(milliseconds, whether all was launched before the device began with it)."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if self._scrub is not None:
            self._scrub.zero_()
        torch.cuda.synchronize()
        torch.cuda._sleep(spin)
        start.record()
        began = time.perf_counter()
        result = call()
        self.launch_ms = (time.perf_counter() - began) * 1e3
        end.record()
        is_ahead = not start.query()
        torch.cuda.synchronize()
        del result
        return start.elapsed_time(end), is_ahead


class Neighbours:
    """How much of the machine other processes took while a with block lasted.

    `share` is their CPU time over that of all cores, the time that a virtual machine
    did not get included; None where /proc/stat does not tell.
    """

    share: float | None = None

    def __enter__(self) -> Neighbours:
        self._began = self._read()
        return self

    def __exit__(self, *_: object) -> None:
        wall, own, all_ = (now - then for now, then in zip(self._read(), self._began, strict=True))
        if wall and not math.isnan(all_):
            # Ticks are long: in a short time one can be more than all there was.
            self.share = min(1.0, max(0.0, (all_ - own) / (wall * (os.cpu_count() or 1))))

    @staticmethod
    def _read() -> tuple[float, float, float]:
        mine = os.times()
        try:
            line = Path("/proc/stat").read_text().split("\n", 1)[0].split()
            # user, nice, system, (idle, iowait,) irq, softirq, steal
            busy = sum(map(int, [*line[1:4], *line[6:9]])) / os.sysconf("SC_CLK_TCK")
        except OSError:
            busy = math.nan
        return time.perf_counter(), mine.user + mine.system, busy


def shuffled(names: Sequence[str], round_: int) -> list[str]:
    """The order of one round, the same in every run. No call always has the same one before it,
    whose traces in caches and memory would be in all of its times."""
    return random.Random(round_).sample(names, len(names))


def alternate(
    calls: Mapping[str, Call],
    *,
    device: str = "cpu",
    min_rounds: int,
    max_rounds: int,
    budget_s: float,
    clock: Callable[[Call], float] | None = None,
    label: str = "",
    cold: bool = True,
    launches: dict[str, list[float]] | None = None,
) -> dict[str, list[float]]:
    """Milliseconds of every round for each call, the calls taking turns.

    At least `min_rounds` rounds, then more, up to `max_rounds`, while `budget_s` seconds
    last. Warm-up is the caller's business. The garbage collector rests meanwhile.

    On a GPU, `cold` is whether each call finds L2 overwritten, and `launches`
    takes the host's milliseconds to launch each call, by name like the result.
    """
    clock = clock or (CudaClock(cold) if device == "cuda" else CpuClock())
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    gc.collect()
    gc.disable()
    began = time.perf_counter()
    try:
        with progress(label) as note:
            for round_ in range(max_rounds):
                spent = time.perf_counter() - began
                # The next round will take about as long as the mean of those before it.
                if round_ >= min_rounds and spent * (round_ + 1) / round_ > budget_s:
                    break
                for name in shuffled(names, round_):
                    note(f"round {round_ + 1}, {name}")
                    times[name].append(clock(calls[name]))
                    launch_ms = getattr(clock, "launch_ms", None)
                    if launches is not None and launch_ms is not None:
                        launches.setdefault(name, []).append(launch_ms)
    finally:
        gc.enable()
    return times


@contextlib.contextmanager
def progress(label: str) -> Iterator[Callable[[str], None]]:
    """Shows `label`, and behind it whatever the yielded function is called with.

    Redrawn in those calls only: a thread that draws would take its time from what is measured.
    Without a terminal: plain lines, one at the start and then at most one in LINES_EVERY_S.
    """
    if console.is_terminal:
        columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
        with Progress(*columns, console=console, transient=True, auto_refresh=False) as bar:
            task = bar.add_task(label, total=None)
            yield lambda text: bar.update(task, description=f"{label}: {text}", refresh=True)
        return
    print_line(label)
    printed = time.monotonic()

    def note(text: str) -> None:
        nonlocal printed
        if time.monotonic() - printed >= LINES_EVERY_S:
            print_line(f"{label}: {text}")
            printed = time.monotonic()

    yield note


def status(message: str) -> contextlib.AbstractContextManager[object]:
    """Shows `message` while a with block lasts; without a terminal, as one plain line."""
    if console.is_terminal:
        return console.status(message, refresh_per_second=1)
    print_line(message)
    return contextlib.nullcontext()


def print_line(message: str) -> None:
    """One line on standard error with the time of day."""
    console.print(
        f"{time.strftime('%H:%M:%S')} {message}", soft_wrap=True, markup=False, highlight=False
    )
