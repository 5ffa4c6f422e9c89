"""Soft cross-entropy through its launcher, compiled and executed as PTX, against float64."""

import pytest
import test_soft_cross_entropy_interpreter as interpreted
import torch


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_matches_float64(run_on_ptx, capability, dtype):
    # Two blocks of 2,048 tokens and a part of a third, rows aligned.
    drawn = interpreted.draw(6, 5008, torch.device("cpu"))
    interpreted.check(run_on_ptx(capability), drawn, dtype)
