"""Learning rates against the papers' formulas and the libraries that their code uses."""

import math

import pytest
import torch
from timm.scheduler import CosineLRScheduler
from transformers import get_linear_schedule_with_warmup

from fastvlp.train.schedules import Schedule


def optimizer(lr):
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def test_clip_rises_by_step_and_falls_by_half_a_cosine():
    schedule = Schedule("cosine", 5e-4, 100, warmup=10)
    assert [schedule(s) for s in range(10)] == pytest.approx([5e-5 * (s + 1) for s in range(10)])
    wanted = [5e-4 * 0.5 * (1 + math.cos(math.pi * s / 90)) for s in range(90)]
    assert [schedule(s) for s in range(10, 100)] == pytest.approx(wanted)
    assert schedule(100) == pytest.approx(0)


def test_vilt_is_linear_as_in_transformers():
    sgd = optimizer(1e-4)
    theirs = get_linear_schedule_with_warmup(sgd, 25, 100)
    schedule = Schedule("linear", 1e-4, 100, warmup=25)
    for step in range(100):
        assert schedule(step) == pytest.approx(theirs.get_last_lr()[0]), step
        sgd.step()
        theirs.step()


def test_albef_is_step_wise_as_its_code_drives_timm():
    lr, first, last, epochs, per_epoch, level = 1e-4, 1e-5, 1e-5, 5, 2500, 100
    sgd = optimizer(lr)
    theirs = CosineLRScheduler(
        sgd, t_initial=epochs, lr_min=last, warmup_t=20, warmup_lr_init=first, warmup_prefix=True,
        cycle_limit=1,
    )  # fmt: skip
    schedule = Schedule(
        "staircase", lr, epochs * per_epoch, warmup=20 * level, final=last, warmup_from=first,
        epoch_steps=per_epoch,
    )  # fmt: skip
    for epoch in range(epochs):
        if epoch:
            theirs.step(epoch + 20)
        for i in range(per_epoch):
            if epoch == 0 and i % level == 0 and i <= 20 * level:
                theirs.step(i // level)
            wanted = sgd.param_groups[0]["lr"]
            assert schedule(epoch * per_epoch + i) == pytest.approx(wanted), (epoch, i)


@pytest.mark.parametrize("kind", ["cosine", "linear", "staircase"])
def test_without_a_rise_a_run_begins_at_the_full_rate(kind):
    schedule = Schedule(kind, 1.0, 10, epoch_steps=5)
    assert schedule(0) == 1.0
    assert all(0 <= schedule(s) <= 1 for s in range(10))
