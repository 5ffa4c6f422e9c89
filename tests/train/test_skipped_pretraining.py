"""A step whose features are not finite leaves ALBEF's queues and momentum encoder as they were."""

import copy

import pytest
import torch
from fastvlp_tests import gloo_ranks
from fastvlp_tests.run_state import same
from fastvlp_tests.tiny_pretraining import build, settings

from fastvlp.optim import AdamWEma
from fastvlp.train import parallel
from fastvlp.train.loop import Loop


def make(ranks, **changes):
    task, loader = build(settings(None, "albef", **changes), ranks)
    parameters = [p for p in task.model.parameters() if p.requires_grad]
    model = parallel.replicate(task.model, ranks)
    optimizer = AdamWEma(parameters, lr=1e-3, ema=task.momentum)
    loop = Loop(task, model, loader, optimizer, lambda s: 1e-3, steps=4, group=ranks.group)
    loop.model.train()
    return loop


def everything(loop):
    return copy.deepcopy([loop.task.model.state_dict(), loop.optimizer.state_dict()])


def one_bad_step(rank, spoil, **changes):
    """Good, bad and good steps; whether the bad one changed nothing, and what is left."""
    with parallel.ranks("cpu") as ranks:
        loop = make(ranks, **changes)
        batches = iter(loop.loader)
        assert loop.train_step(next(batches)).taken
        before = everything(loop)
        bad = next(batches)
        if rank == 0:
            spoil(bad)
        assert not loop.train_step(bad).taken
        unchanged = all(map(same, everything(loop), before))
        assert loop.train_step(next(batches)).taken
        queue = loop.task.model.queue
        return unchanged, int(queue.position), queue.image_queue.clone()


def nan_image(batch):
    batch.images[0, 0, 0, 0] = float("nan")


def infinite_image(batch):
    batch.images[-1] = float("inf")


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("spoil", [nan_image, infinite_image])
def test_queues_and_momentum_encoder_are_as_they_were(spoil, chunk_size):
    unchanged, position, queue = one_bad_step(0, spoil, chunk_size=chunk_size)
    assert unchanged and position == 2 * 8
    assert queue.isfinite().all()


def test_on_ranks_of_which_one_meets_it():
    found = gloo_ranks.run(2, one_bad_step, nan_image)
    for unchanged, position, queue in found:
        assert unchanged and position == 2 * 8
        assert queue.isfinite().all() and torch.equal(queue, found[0][2])
