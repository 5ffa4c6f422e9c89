"""Several ranks of torch.distributed on this machine, and their time in lock step."""

from __future__ import annotations

import datetime
import gc
import multiprocessing
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from _harness import timing
from _harness.timing import Call

# Imported once, by the server from which ranks are forked; a missing one is passed over.
PRELOADED = ("torch", "fastvlp.losses", "torch.distributed.nn")


def launch(
    world_size: int,
    work: Callable[..., Any],
    *args: Any,
    device: str = "cpu",
    threads: int = 1,
    timeout_s: float = 900.0,
) -> list[Any]:
    """`work(*args)` in `world_size` new processes of one default group; its results by rank.

    The group is gloo on a CPU and NCCL, one GPU per rank, on CUDA; `threads` are those of
    each rank. Only rank 0 shows progress. When a rank fails all of them are ended and
    RuntimeError carries its traceback. `work` and `args` must be picklable.
    """
    # Not forked from this process, whose thread pools would not survive in a child.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = {}, []
        try:
            for rank in range(world_size):
                ours, theirs = context.Pipe(duplex=False)
                store = f"file://{Path(folder) / 'store'}"
                options = (rank, world_size, store, device, threads, timeout_s)
                process = context.Process(
                    target=_rank, args=(theirs, options, work, args), daemon=True
                )
                process.start()
                processes.append(process)
                theirs.close()
                pipes[ours] = rank
            return _collect(pipes, processes, timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.join()
            for pipe in pipes:
                pipe.close()


def _collect(pipes: Mapping[Connection, int], processes: list, timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    while len(results) < len(pipes):
        pending = [pipe for pipe, rank in pipes.items() if rank not in results]
        ready = wait(pending, max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RuntimeError(f"no answer from {len(pending)} ranks within {timeout_s:.0f} s")
        for pipe in ready:
            rank = pipes[pipe]
            try:
                failure, results[rank] = pipe.recv()
            except EOFError:
                processes[rank].join()
                failure = f"its process ended with exit code {processes[rank].exitcode}"
            if failure:
                raise RuntimeError(f"rank {rank} of {len(pipes)}: {failure}")
    # Ranks leave together: one that goes first would break what the others still exchange.
    for process in processes:
        process.join(10)
    return [results[rank] for rank in range(len(pipes))]


def _rank(answer: Connection, options: tuple, work: Callable[..., Any], args: tuple) -> None:
    rank, world_size, store, device, threads, timeout_s = options
    timing.console.quiet = rank > 0
    # Ctrl-C reaches every process of the terminal; this one is ended by its parent.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        torch.set_num_threads(threads)
        if device == "cuda":
            torch.cuda.set_device(rank)
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo",
            init_method=store,
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout_s),
        )
        result = work(*args)
        dist.barrier()
        answer.send(("", result))
        dist.destroy_process_group()
    except Exception:
        answer.send((traceback.format_exc(), None))


class LockStepClock:
    """Wall time of one call on this rank in milliseconds, all ranks starting together."""

    def __init__(self, device: str) -> None:
        self._finish = torch.cuda.synchronize if device == "cuda" else lambda: None

    def __call__(self, call: Call) -> float:
        self._finish()
        dist.barrier()
        self._finish()
        start = time.perf_counter()
        result = call()
        self._finish()
        elapsed = time.perf_counter() - start
        del result
        return elapsed * 1e3


def slowest(times: list[float], device: str) -> list[float]:
    """Elementwise the longest time among the ranks."""
    longest = torch.tensor(times, dtype=torch.float64, device=device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    return longest.tolist()


def alternate(
    calls: Mapping[str, Call],
    *,
    device: str,
    min_rounds: int,
    max_rounds: int,
    budget_s: float,
    label: str = "",
) -> dict[str, list[float]]:
    """As `timing.alternate`, in lock step: a call takes as long as on the slowest rank.

    The number of rounds follows from a round of warm-up, so that all ranks agree on it.
    """
    clock = LockStepClock(device)
    with timing.status(f"{label}: warming up"):
        warmup = slowest([clock(call) for call in calls.values()], device)
    rounds = min(max_rounds, max(min_rounds, int(budget_s * 1e3 / sum(warmup))))
    times = timing.alternate(
        calls,
        device=device,
        min_rounds=rounds,
        max_rounds=rounds,
        budget_s=0.0,
        clock=clock,
        label=label,
    )
    gc.collect()
    return {name: slowest(own, device) for name, own in times.items()}
