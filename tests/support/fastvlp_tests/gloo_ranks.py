"""Runs a function on several gloo ranks, each a process, within a time limit."""

import os
import pickle
import socket
import sys
import time
import traceback

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fastvlp_tests import seeds, test_files

# Far above what any of them takes, on a machine with other work too.
HANGS_S = 900


def run(world_size, function, *args):
    """function(rank, *args) on every rank; returns the results by rank.

    An exception comes back as its text. A rank still running after `HANGS_S` seconds fails the
    test: it hangs.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    # Bytes, so that a rank imports the test module of `function` once its seeds are shifted.
    job = pickle.dumps((function, args))
    processes = [
        context.Process(target=_rank, args=(results, rank, world_size, port, job))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    found, end = {}, time.monotonic() + HANGS_S
    try:
        while len(found) < world_size:
            assert time.monotonic() < end, f"ranks {set(range(world_size)) - set(found)} hang"
            if results.empty():
                time.sleep(0.02)
            else:
                rank, result = results.get()
                # Bytes, because tensors in a queue are files that die with their sender.
                found[rank] = pickle.loads(result)
    finally:
        for process in processes:
            process.join(timeout=5)
            process.kill()
    return [found[rank] for rank in range(world_size)]


def _rank(results, rank, world_size, port, job):
    seeds.inherit()
    sys.path.append(str(test_files.TESTS.parent))  # test modules are named from there
    function, args = pickle.loads(job)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    result = _attempt(function, rank, *args)
    results.put((rank, pickle.dumps(result)))
    dist.barrier()
    dist.destroy_process_group()


def several(rank, jobs):
    """What each of `jobs`, (function, *args) by name, gives, one after another in one process."""
    return {name: _attempt(function, rank, *args) for name, (function, *args) in jobs.items()}


def _attempt(function, rank, *args):
    try:
        return function(rank, *args)
    except Exception as error:
        return f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
