"""What a step launches, on a GPU that is not there."""

import pytest
import torch
from fastvlp_tests import triton_process
from fastvlp_tests.momentum_cases import draw
from ptx_machine import virtual_process

MODULE = "momentum_contrastive.losses"
MULTIPROCESSORS = 132


@pytest.fixture(scope="module")
def pool():
    with triton_process.start(interpret=False, workers=1) as started:
        yield started


@pytest.mark.parametrize("kinds", [0, 7], ids=["", "ids"])
def test_both_directions_and_negatives_come_from_two_launches(pool, kinds):
    step = draw(64, 100, 256, torch.bfloat16, "cpu", kinds=kinds)
    task = pool.submit(
        virtual_process.count, 90, {"execute": False}, MODULE, "momentum_contrastive",
        *step.arguments(), True, True, True,
    )  # fmt: skip
    _, launches = task.result()
    blocks, slices = (2, 66) if not kinds else (3, 44)
    assert launches == [("keys_kernel", (blocks, 2, slices)), ("merge_kernel", (64, 2, 1))]
    # Two programs for each multiprocessor.
    assert blocks * 2 * slices == 2 * MULTIPROCESSORS


@pytest.mark.parametrize("warps", [4, 8])
@pytest.mark.parametrize("blocks", [1, 2, 4, 6, 16, 64, 100, 128, 1000])
def test_slices_make_whole_waves(pool, blocks, warps):
    task = pool.submit(
        virtual_process.run, 90, {}, MODULE, "_slices", torch.device("cpu"), blocks, warps
    )
    slices = task.result()
    at_once = MULTIPROCESSORS * 8 // warps
    waves = -(-slices * blocks // at_once)
    # One more slice would take a wave more; of the batch's own there are seven others at the least.
    assert (slices + 1) * blocks > waves * at_once
    assert slices >= 8 > (waves - 1) * at_once / blocks
