"""Runs a function on several gloo ranks, each a process, within a time limit."""

import atexit
import importlib
import os
import pickle
import socket
import sys
import time
import traceback
from functools import cache
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fastvlp_tests import seeds, test_files

# Far above what any of them takes, on a machine with other work too.
HANGS_S = 900
# What ranks import, once, in the process that they are forked from.
PRELOADED = (
    "fastvlp.train.run", "hypothesis", "matplotlib.backends.backend_agg", "pytest",
    "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp",
    "torch.utils.tensorboard",
)  # fmt: skip


def run(world_size, function, *args):
    """function(rank, *args) on every rank; returns the results by rank.

    An exception comes back as its text. A rank still running after `HANGS_S` seconds fails the
    test: it hangs.
    """
    # Bytes, so that a rank imports the test module of `function` once its seeds are shifted.
    job = pickle.dumps((function, args))
    server = _server()
    server.send((world_size, dict(os.environ), sys.path, job))
    found, fault = server.recv()
    assert fault is None, fault
    return [pickle.loads(each) for each in found]


@cache
def _server() -> Connection:
    """The way to a process from which ranks are forked: it has the imports and no threads yet."""
    ours, theirs = mp.Pipe()
    process = mp.get_context("spawn").Process(target=_serve, args=(theirs,))
    process.start()
    theirs.close()
    atexit.register(ours.close)  # the server ends then, for which this process waits
    return ours


def _serve(connection) -> None:
    for name in PRELOADED:
        importlib.import_module(name)
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        connection.send(_run(*request))


def _run(world_size, environment, path, job):
    """(results, pickled, by rank; what went wrong with the ranks themselves or None)."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    environment = environment | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    context = mp.get_context("fork")
    results = context.SimpleQueue()
    processes = [
        context.Process(target=_rank, args=(results, rank, world_size, environment, path, job))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    found, end = {}, time.monotonic() + HANGS_S
    try:
        while len(found) < world_size:
            missing = set(range(world_size)) - set(found)
            ended = [rank for rank in missing if processes[rank].exitcode is not None]
            if not results.empty():
                rank, found[rank] = results.get()
            elif ended:
                return None, f"ranks {ended} ended without a result"
            elif time.monotonic() > end:
                return None, f"ranks {missing} hang"
            else:
                time.sleep(0.02)
    finally:
        for process in processes:
            process.join(timeout=5 if len(found) == world_size else 0)
            process.kill()
    return [found[rank] for rank in range(world_size)], None


def _rank(results, rank, world_size, environment, path, job):
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:] = path
    seeds.inherit()
    sys.path.append(str(test_files.TESTS.parent))  # test modules are named from there
    function, args = pickle.loads(job)
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
