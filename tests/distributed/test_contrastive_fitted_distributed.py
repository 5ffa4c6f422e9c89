"""Pairs that are nearly fitted, over ranks: a small loss keeps its relative accuracy."""

import pytest
import torch
import torch.distributed as dist
from fastvlp_tests import gloo_ranks
from fastvlp_tests.contrastive_cases import run, well_fitted

from fastvlp.ops import contrastive_reference

SCHEDULES = ("gather", "ring")


def features():
    return well_fitted(40, 32, 100.0, 1.0, 1e-7)


def shares(rank):
    """Loss and gradients by each schedule, averaged over ranks as DDP would.

    Rank 0 holds one pair: its part of the logits has no negative.
    """
    from fastvlp.ops import contrastive

    mine = slice(0, 1) if rank == 0 else slice(1, None)
    image, text = (t[mine] for t in features())
    found = {}
    for schedule in SCHEDULES:
        result = run(
            contrastive, image, text, 100.0, 0.0, group=dist.group.WORLD, schedule=schedule
        )
        scalars = torch.stack((result.loss, result.scale))
        dist.all_reduce(scalars)
        found[schedule] = result.image / 2, result.text / 2, scalars / 2
    return found


@pytest.fixture(scope="module")
def found():
    return gloo_ranks.run(2, shares)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_is_left_is_the_rounding_of_logits(found, schedule):
    exact = run(contrastive_reference, *features(), 100.0, 0.0, torch.float64)
    images, texts, scalars = zip(*(each[schedule] for each in found), strict=True)
    for parts, wanted in ((images, exact.image), (texts, exact.text)):
        assert (torch.cat(parts) - wanted).norm() <= 2e-5 * wanted.norm()
    wanted = torch.stack((exact.loss, exact.scale)).float()
    for each in scalars:
        torch.testing.assert_close(each, wanted, rtol=2e-5, atol=0)
