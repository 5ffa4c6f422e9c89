"""FeatureQueue over a process group: parts of any size enter in rank order, or none does."""

import pytest
import torch
import torch.distributed as dist
from fastvlp_tests import gloo_ranks

from fastvlp import FeatureQueue

SIZES = [(2, 3), (4, 0), (1, 5)]


def part(step, rank, dim=4):
    first = 100 * step + 10 * rank
    ids = torch.arange(first, first + SIZES[step][rank])
    rows = ids[:, None].float().expand(-1, dim).contiguous()
    return rows, -rows, ids


def enqueue_all(rank, dtype):
    queue = FeatureQueue(7, 4, dtype=dtype, with_ids=True, group=dist.group.WORLD)
    for step in range(len(SIZES)):
        queue.enqueue(*part(step, rank))
    return queue.state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_rank_holds_the_queue_of_the_whole_batch(dtype):
    alone = FeatureQueue(7, 4, dtype=dtype, with_ids=True)
    for step in range(len(SIZES)):
        parts = zip(*(part(step, rank) for rank in range(2)), strict=True)
        alone.enqueue(*(torch.cat(each) for each in parts))
    for state in gloo_ranks.run(2, enqueue_all, dtype):
        for name, value in alone.state_dict().items():
            assert torch.equal(state[name], value), name


def one_rank_fails(rank):
    queue = FeatureQueue(7, 4, with_ids=True, check_finite=True, group=dist.group.WORLD)
    queue.enqueue(*part(0, rank))
    before = {k: v.clone() for k, v in queue.state_dict().items()}
    rows, texts, ids = part(1, rank)
    if rank == 0:
        rows[1, 2] = torch.nan
    try:
        queue.enqueue(rows, texts, ids)
        error = ""
    except RuntimeError as found:
        error = str(found)
    return error, all(torch.equal(v, before[k]) for k, v in queue.state_dict().items())


def test_a_batch_refused_on_one_rank_enters_on_none():
    for error, unchanged in gloo_ranks.run(2, one_rank_fails):
        assert "rank 0 of the group: ValueError: image_features: expected finite" in error
        assert unchanged
