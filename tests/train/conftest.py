"""What makes tests of many tiny runs quick."""

import pytest
import torch

from fastvlp.train import logging


@pytest.fixture(scope="module")
def quick_runs():
    """One thread, which for so little work is the fastest number, and no images of the curve.

    What draws them, for a test of that.
    """
    threads, draw = torch.get_num_threads(), logging.draw_curve
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging, "draw_curve", lambda folder: None)
        yield draw
    torch.set_num_threads(threads)
