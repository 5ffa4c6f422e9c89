"""Work for ranks of torch.distributed; ranks import it, so it cannot lie in a test module."""

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from baselines.contrastive.traffic import Traffic, loopback_bytes

ROWS, BYTES = 6, 6 * 10 * 4  # of a shard


def _shard(**options):
    return torch.ones(ROWS, 10, **options)


def _all_gather():
    parts = [torch.empty(ROWS, 10) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, _shard())


def _all_gather_into_tensor():
    dist.all_gather_into_tensor(torch.empty(ROWS * dist.get_world_size(), 10), _shard())


def _reduce_scatter_tensor():
    dist.reduce_scatter_tensor(_shard(), torch.ones(ROWS * dist.get_world_size(), 10))


def _all_to_all_single():
    whole = torch.ones(ROWS * dist.get_world_size(), 10)
    dist.all_to_all_single(torch.empty_like(whole), whole)


def _all_to_all_single_of_unequal_parts():
    # Rank r gives q+1 rows to rank q, its own included.
    world, rank = dist.get_world_size(), dist.get_rank()
    sizes = [q + 1 for q in range(world)]
    incoming = torch.empty(world * (rank + 1), 10)
    dist.all_to_all_single(incoming, torch.ones(sum(sizes), 10), [rank + 1] * world, sizes)


def _scatter():
    parts = [_shard() for _ in range(dist.get_world_size())] if dist.get_rank() == 0 else None
    dist.scatter(_shard(), parts, src=0)


def _gather():
    parts = [_shard() for _ in range(dist.get_world_size())] if dist.get_rank() == 0 else None
    dist.gather(_shard(), parts, dst=0)


def _ring_pass():
    world, rank = dist.get_world_size(), dist.get_rank()
    exchange = [
        dist.P2POp(dist.isend, _shard(), (rank + 1) % world),
        dist.P2POp(dist.irecv, _shard(), (rank - 1) % world),
    ]
    for work in dist.batch_isend_irecv(exchange):
        work.wait()


def _functional_all_gather_and_backward():
    shard = _shard(requires_grad=True)
    functional.all_gather_tensor_autograd(shard, 0, dist.group.WORLD).sum().backward()


def _nn_all_gather_and_backward():
    import torch.distributed.nn

    shard = _shard(requires_grad=True)
    torch.cat(torch.distributed.nn.all_gather(shard)).sum().backward()


def _custom_operator():
    @torch.library.custom_op("fastvlp_tests::reduced", mutates_args=())
    def reduced(x: torch.Tensor) -> torch.Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    torch.ops.fastvlp_tests.reduced(_shard())


EXCHANGES = {
    "all_gather": _all_gather,
    "all_gather_into_tensor": _all_gather_into_tensor,
    "reduce_scatter_tensor": _reduce_scatter_tensor,
    "all_reduce": lambda: dist.all_reduce(_shard()),
    "all_reduce of bf16": lambda: dist.all_reduce(_shard(dtype=torch.bfloat16)),
    "broadcast": lambda: dist.broadcast(_shard(), 0),
    "reduce": lambda: dist.reduce(_shard(), 0),
    "all_to_all_single": _all_to_all_single,
    "all_to_all_single, unequal": _all_to_all_single_of_unequal_parts,
    "scatter": _scatter,
    "gather": _gather,
    "send and receive": _ring_pass,
    "functional all_gather, backward": _functional_all_gather_and_backward,
    "nn.all_gather, backward": _nn_all_gather_and_backward,
    "inside a custom operator": _custom_operator,
    "barrier": dist.barrier,
}


def expected(name, rank, world):
    """Bytes that `rank` sends: written down for each exchange, in shards."""
    others = world - 1
    shards = {
        "all_gather": others,
        "all_gather_into_tensor": others,
        "reduce_scatter_tensor": others,
        "all_reduce": 2 * others / world,
        "all_reduce of bf16": others / world,
        "broadcast": others / world,
        "reduce": others / world,
        "all_to_all_single": others,
        "all_to_all_single, unequal": (world * (world + 1) / 2 - rank - 1) / ROWS,
        "scatter": others if rank == 0 else 0,
        "gather": 0 if rank == 0 else 1,
        "send and receive": 1,
        "functional all_gather, backward": 2 * others,
        "nn.all_gather, backward": 2 * others,
        "inside a custom operator": 2 * others / world,
        "barrier": 0,
    }
    return shards[name] * BYTES


def count_each():
    found = {}
    for name, exchange in EXCHANGES.items():
        with Traffic() as traffic:
            exchange()
        found[name] = traffic.bytes_sent
    return found


def seen_on_loopback(rows):
    """(bytes over the loopback meanwhile, bytes counted on this rank) of an all-gather."""
    shard = torch.ones(rows, 1024)
    whole = torch.empty(rows * dist.get_world_size(), 1024)
    dist.barrier()
    before = loopback_bytes()
    dist.barrier()
    with Traffic() as traffic:
        dist.all_gather_into_tensor(whole, shard)
    dist.barrier()
    return loopback_bytes() - before, traffic.bytes_sent


def fail_on(rank):
    if dist.get_rank() == rank:
        raise ValueError(f"rank {rank} gives up")
    dist.barrier()
    dist.barrier()


def leave():
    import os

    os._exit(3)


def take_turns(rounds):
    """Milliseconds of a call that takes (rank + 1) times 5 ms, as `ranks.alternate` has them."""
    import time

    from _harness import ranks

    def call():
        time.sleep(0.005 * (dist.get_rank() + 1))

    return ranks.alternate(
        {"a": call, "b": call}, device="cpu", min_rounds=rounds, max_rounds=rounds, budget_s=0.0
    )


def errors_of(jobs):
    """For each job the errors of open_clip's loss, as it should be and with the gradient of the
    own rank's loss only, which is known to lose what comes from other ranks."""
    from functools import partial

    import itc_distributed
    from _harness.measure import Implementation
    from baselines.contrastive import distributed as distributed_peers
    from baselines.contrastive.softmax import forward_backward, open_clip_loss

    place = {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
    local = partial(open_clip_loss().ClipLoss, True, False, **place)
    return [
        tuple(
            itc_distributed.errors(
                Implementation("open_clip", partial(forward_backward, make_loss)), job
            )
            for make_loss in (distributed_peers.open_clip, local)
        )
        for job in jobs
    ]
