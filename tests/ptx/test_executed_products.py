"""How many matrix instructions the contrastive kernels execute: those of one product, whatever the
features are."""

import math
import re

import pytest
import test_contrastive_interpreter as contrastive
import torch
from ptx_machine import virtual_process

# Rows and columns of a tile in half precision, and the width of the features.
TILE = 128, 64
WIDTH = 128
KERNEL = "statistics_kernel"
SHAPE = re.compile(r"^(wg)?mma\S*\.m(\d+)n(\d+)k(\d+)\.")


def multiply_adds(executed):
    """Of the matrix instructions, counted for each warp: wgmma is one of four warps together."""
    total = 0
    for opcode, times in executed.items():
        if found := SHAPE.match(opcode):
            warps = 4 if found.group(1) else 1
            total += math.prod(map(int, found.groups()[1:])) * times // warps
    return total


def features(kind, rows):
    if kind == "equal":
        return torch.ones(rows, WIDTH, dtype=torch.bfloat16) / WIDTH**0.5
    cosine = 0.5 if kind == "in classes" else 0.0
    return contrastive.in_classes(rows, WIDTH, cosine, torch.bfloat16, torch.device("cpu"))


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kind", ["random", "in classes", "equal"])
def test_statistics_make_one_product(virtual_gpus, capability, kind):
    x, y = features(kind, 150), features(kind, 150).roll(4, 0)
    launches = (
        virtual_gpus(capability)
        .submit(
            virtual_process.count, capability, "contrastive", "contrastive_statistics", x, y,
            torch.tensor([100.0]),
        )
        .result()
    )  # fmt: skip
    (found,) = [(blocks, executed) for name, blocks, executed in launches if name == KERNEL]
    blocks, executed = found
    assert blocks == 2 * 3
    assert multiply_adds(executed) == blocks * math.prod(TILE) * WIDTH
