"""Extra peak memory of a call: bytes above its inputs at the highest point, in MB of 10^6.

On a CPU the call runs once in a process of its own, and the peak is the kernel's high-water
mark of resident memory, reset just before the call: it sees every allocator, whoever
allocates. On a GPU it is the peak of torch's caching allocator.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

MB = 1_000_000
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1


# Imported once, by the server from which the measuring processes are forked.
_imports = ["torch"]


def preload(*modules: str) -> None:
    """Start importing `modules` for all measuring processes, while this process goes on.

    To be called before the first of them starts. Importing must start no threads.
    """
    _imports.extend(module for module in modules if module not in _imports)
    multiprocessing.set_forkserver_preload(_imports)
    forkserver.ensure_running()


@dataclass(frozen=True)
class Probe:
    """Extra peak in MB and milliseconds per call, or why they could not be had."""

    peak_mb: float | None
    ms: float | None = None
    failure: str = ""


def extra_peak(
    make: Callable[[Any], Callable[[], Any]],
    build: Callable[[], Any],
    tiny: Callable[[], Any],
    *,
    threads: int,
    device: str = "cpu",
    warm_full: bool = False,
    repeats: int = 0,
    timeout_s: float = 900.0,
) -> Probe:
    """Extra peak memory of `make(build())()`, its results included, its inputs not.

    A call on `tiny()` goes first, so that thread pools and lazily loaded code are not
    counted; `warm_full` adds a call on the full inputs, for an implementation that compiles for
    its shape. `repeats` further calls are timed (0: the measured call itself is).
    On a CPU `make`, `build` and `tiny` must be picklable.
    """
    if device == "cuda":
        return _cuda_peak(make, build, tiny, repeats)
    if not _CLEAR.exists():
        return Probe(None, failure="needs Linux with /proc/self/clear_refs")
    # Never fork this process: its OpenMP pool would not survive in the child. The fork
    # server imports torch once and starts no pool, so every child starts clean and fast.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_imports)
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(
        target=_child, args=(theirs, make, build, tiny, threads, warm_full, repeats), daemon=True
    )
    child.start()
    theirs.close()
    try:
        if not ours.poll(timeout_s):
            return Probe(None, failure=f"no answer within {timeout_s:.0f} s")
        probe = ours.recv()
        child.join(5)
        return probe
    except EOFError:
        child.join()
        return Probe(None, failure=f"its process ended with exit code {child.exitcode}")
    finally:
        child.kill()
        child.join()
        ours.close()


def _child(
    answer: Connection,
    make: Callable[[Any], Callable[[], Any]],
    build: Callable[[], Any],
    tiny: Callable[[], Any],
    threads: int,
    warm_full: bool,
    repeats: int,
) -> None:
    # Ctrl-C reaches every process of the terminal; this one is ended by its parent.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    try:
        answer.send(_resident_peak(make, build, tiny, warm_full, repeats))
    except Exception as error:
        answer.send(Probe(None, failure=f"{type(error).__name__}: {error}"))


def _resident_peak(
    make: Callable[[Any], Callable[[], Any]],
    build: Callable[[], Any],
    tiny: Callable[[], Any],
    warm_full: bool,
    repeats: int,
) -> Probe:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        # glibc raises its threshold each time a big block is freed, after which blocks up
        # to 32 MB come from a heap that keeps them: a later peak would hide in that heap.
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 16)
        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 16)
    make(tiny())()
    call = make(build())
    if warm_full:
        call()
    gc.collect()
    gc.disable()
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    _CLEAR.write_text("5")
    before = _status_bytes("VmRSS")
    first, result = _timed(call)
    peak = _status_bytes("VmHWM") - before
    del result
    later = [_timed(call)[0] for _ in range(repeats)]
    return Probe(peak / MB, statistics.median(later or [first]))


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return (time.perf_counter() - start) * 1e3, result


def _status_bytes(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no line {name}")


def _cuda_peak(
    make: Callable[[Any], Callable[[], Any]],
    build: Callable[[], Any],
    tiny: Callable[[], Any],
    repeats: int,
) -> Probe:
    make(tiny())()
    call = make(build())
    call()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(1 + repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return Probe((torch.cuda.max_memory_allocated() - before) / MB, statistics.median(times))
