"""How many matrix instructions the contrastive kernels execute: those of one matmul, whatever the
features are."""

import math
import re

import pytest
import torch
from fastvlp_tests import contrastive_formulas as contrastive

# Rows and columns of a tile in half precision by compute capability, and the width of the features.
TILES = {80: (128, 64), 90: (128, 128)}
WIDTH = 128
KERNEL = "statistics_kernel"
SHAPE = re.compile(r"^(?:wg)?mma\S*\.m(\d+)n(\d+)k(\d+)\.")


def multiply_adds(executed):
    """Of the matrix instructions, of a warp or a warpgroup each."""
    return sum(
        math.prod(map(int, found.groups())) * times
        for opcode, times in executed.items()
        if (found := SHAPE.match(opcode))
    )


def features(kind, rows):
    if kind == "equal":
        return torch.ones(rows, WIDTH, dtype=torch.bfloat16) / WIDTH**0.5
    cosine = 0.5 if kind == "in classes" else 0.0
    return contrastive.in_classes(rows, WIDTH, cosine, torch.bfloat16, torch.device("cpu"))


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kind", ["random", "in classes", "equal"])
def test_statistics_make_one_matmul(count_on_ptx, capability, kind):
    x, y = features(kind, 150), features(kind, 150).roll(4, 0)
    _, launches = count_on_ptx(capability)(
        "contrastive.forward", "contrastive_statistics", x, y, torch.tensor([100.0])
    )
    ((grid, counts),) = [(grid, counts) for name, grid, counts in launches if name == KERNEL]
    tiles = math.prod(-(-150 // size) for size in TILES[capability])
    assert math.prod(grid) == tiles
    assert multiply_adds(counts.instructions) == tiles * math.prod(TILES[capability]) * WIDTH
