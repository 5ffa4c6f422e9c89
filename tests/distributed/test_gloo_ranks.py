"""What the distributed tests run on: one process that forks ranks."""

import os

import pytest
import torch.distributed as dist
from fastvlp_tests import gloo_ranks


def described(rank, word):
    return rank, dist.get_world_size(), word, os.environ.get("FASTVLP_WORD"), os.getppid()


def fail(rank):
    raise KeyError(rank)


def leave(rank):
    if rank == 1:
        os._exit(3)


def test_ranks_have_the_arguments_and_the_environment_of_the_call(monkeypatch):
    parents = set()
    for world_size, word in ((2, "one"), (3, "two")):
        monkeypatch.setenv("FASTVLP_WORD", word)
        found = gloo_ranks.run(world_size, described, word)
        assert [each[:4] for each in found] == [
            (r, world_size, word, word) for r in range(world_size)
        ]
        parents.update(each[4] for each in found)
    assert len(parents) == 1 and os.getpid() not in parents


def test_an_exception_comes_back_as_its_text():
    for rank, found in enumerate(gloo_ranks.run(2, fail)):
        assert found.startswith(f"KeyError: {rank}\n") and "Traceback" in found


def test_a_rank_that_ends_is_missed_at_once_and_the_next_ranks_run():
    with pytest.raises(AssertionError, match=r"ranks \[1\] ended without a result"):
        gloo_ranks.run(2, leave)
    assert [found[0] for found in gloo_ranks.run(2, described, "again")] == [0, 1]
