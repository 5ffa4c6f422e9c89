"""What fails on one rank is raised on all, and what takes long on one keeps the others waiting."""

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from fastvlp_tests import gloo_ranks, photo_shards

from fastvlp.data.loader import TooManyBroken
from fastvlp.optim import AdamWEma
from fastvlp.train import parallel
from fastvlp.train.loop import Loop
from fastvlp.train.parallel import Ranks
from fastvlp.train.tasks import data
from fastvlp.train.tasks.base import Task
from fastvlp.train.tasks.vilt import matching_accuracy


class Line(Task):
    """A straight line through points."""

    def __init__(self):
        self.model = torch.nn.Linear(1, 1)

    def losses(self, model, batch):
        return {"loss": model(batch).square().mean()}

    def split(self, batch, rows, least=1):
        return [(batch, 1.0)]


class Batches(list):
    """A loader that gives the batches and ends with an error, if there is one."""

    samples = 8

    def __init__(self, batches, error=None):
        super().__init__(batches)
        self.error = error

    def __iter__(self):
        yield from super().__iter__()
        if self.error is not None:
            raise self.error

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


BROKEN = "5 of 20 samples of rank 1 are broken"


class Unsendable(Exception):
    def __init__(self, one, other):
        super().__init__(f"{one} and {other}")


def trained(group, error):
    """The steps taken before the error comes out, and the error."""
    task = Line()
    loader = Batches([torch.ones(2, 1)] * 3, error)
    optimizer = AdamWEma(task.model.parameters(), lr=0.1)
    loop = Loop(task, task.model, loader, optimizer, lambda step: 0.1, steps=9, group=group)
    with pytest.raises(Exception) as caught:
        loop.run()
    return loop.step, type(caught.value).__name__, str(caught.value)


def training(rank, error):
    return trained(dist.group.WORLD, error if rank == 1 else None)


def ranks():
    return Ranks(dist.get_rank(), 2, torch.device("cpu"), dist.group.WORLD)


def missing_shards(rank, folder):
    chosen = folder / "none" if rank == 1 else folder
    data.shard_loader(str(chosen), "clip_eval", {}, 1, None, ranks())


def matching(rank):
    # There is no model: the first rank does not compute with its batch, which a sharded model would
    # do on all ranks together.
    loader = Batches([], TooManyBroken(BROKEN)) if rank == 1 else Batches([object()])
    return matching_accuracy(None, None, loader, ranks())


def slow(seconds, outcome):
    time.sleep(seconds)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def long_work(rank, seconds, outcome):
    """With a group whose timeout is shorter than the first of them take."""
    parallel._BEAT = 0.2
    group = dist.new_group(timeout=timedelta(seconds=5))
    return parallel.from_first(lambda: slow(seconds, outcome), ranks(), group, takes_long=True)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    photo_shards.write(folder, 2)
    jobs = {
        "training": (training, TooManyBroken(BROKEN)),
        "no pickle": (training_unsendable,),
        "shards": (missing_shards, folder),
        "matching": (matching,),
        "long": (long_work, 8, 7),
        "long error": (long_work, 0, KeyError("lost")),
    }
    return gloo_ranks.run(2, gloo_ranks.several, jobs)


def training_unsendable(rank):
    return training(rank, Unsendable("a", "b"))


def test_a_loader_that_fails_on_one_rank_ends_the_training_of_all(results):
    for found in results:
        assert found["training"] == (3, "TooManyBroken", BROKEN)


def test_an_error_that_cannot_be_sent_is_told(results):
    first, second = (found["no pickle"] for found in results)
    assert first == (3, "RuntimeError", "Unsendable: a and b")
    assert second == (3, "Unsendable", "a and b")


def test_alone_the_error_passes_unchanged():
    error = TooManyBroken(BROKEN)
    assert trained(None, error) == (3, "TooManyBroken", BROKEN)


def test_shards_that_one_rank_lacks_are_an_error_of_all(results):
    for found in results:
        assert found["shards"].startswith("FileNotFoundError: shards: nothing is there")


def test_an_evaluation_that_fails_on_one_rank_fails_on_all(results):
    for found in results:
        assert found["matching"].startswith(f"TooManyBroken: {BROKEN}")


def test_work_of_the_first_rank_may_take_longer_than_the_timeout(results):
    for found in results:
        assert found["long"] == 7
        assert found["long error"].startswith("KeyError: 'lost'")
