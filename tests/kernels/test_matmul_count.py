"""The compiled contrastive kernels compute the matmul of a tile once, whatever the features."""

import math
import re

import pytest
from fastvlp_tests import ptx_text, triton_process

TILE = re.compile(r" (\w+) (\d+)x(\d+)x(\d+)")
# One per warp of the block, or one per group of four warps.
MATRIX_INSTRUCTIONS = {"mma.sync.aligned": 1, "wgmma.mma_async.sync.aligned": 4}
CAPABILITIES = (80, 90, 120)


def multiply_adds(ptx, warps):
    """Of every matrix instruction in a loop of the text, over all warps of a block."""
    total, ptx = 0, ptx_text.loops_of(ptx)
    for name, together in MATRIX_INSTRUCTIONS.items():
        for shape in re.findall(rf"{re.escape(name)}\.m(\d+)n(\d+)k(\d+)", ptx):
            total += math.prod(map(int, shape)) * warps // together
    return total


@pytest.fixture(scope="module")
def cases():
    from fastvlp.kernels._core import aot

    return {(case.name, case.capability): case for case in aot.all_cases()}


@pytest.fixture
def compiled(compiler):
    return lambda *case: compiler.submit(triton_process.ptx_of, *case).result()


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("kernel", ["statistics", "gradient", "sigmoid"])
def test_a_tile_of_logits_takes_one_matmul(cases, compiled, kernel, capability):
    (name,) = (
        n for n, c in cases if c == capability and re.match(rf"{kernel} bf16 \d+x\d+x\d+$", n)
    )
    case = cases[name, capability]
    sizes = map(int, TILE.search(name).groups()[1:])
    assert multiply_adds(compiled(name, capability), case.warps) == math.prod(sizes)
