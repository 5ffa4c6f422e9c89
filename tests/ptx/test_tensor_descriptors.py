"""Triton kernels with tensor descriptors: copies of tiles, mbarriers and wgmma at work together."""

import pytest
import torch
from fastvlp_tests.tolerance import assert_as_accurate, epsilon
from ptx_machine import virtual_process

DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture
def run(virtual_gpus):
    def call(function, *args):
        return virtual_gpus(90).submit(
            virtual_process.call, "fastvlp_tests.tensor_kernels", function, *args
        ).result()  # fmt: skip

    return call


@pytest.mark.parametrize("host", [True, False], ids=["host", "kernel"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m, n, k", [(150, 72, 200), (128, 128, 256)], ids=["ragged", "aligned"])
def test_products(run, kernel_counts, host, dtype, m, n, k):
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(rows, k, generator=g).to(dtype) for rows in (m, n))
    ours, exact = run("product", x, y, host), x.double() @ y.double().T
    floor = epsilon(dtype) * exact.norm()
    assert_as_accurate("product", ours, x @ y.T, exact, floor)
    kernel_counts.executed(90)


@pytest.mark.parametrize("padding, value", [("zero", 0.0), ("nan", float("nan"))])
def test_boxes_beyond_the_tensor_are_padded(run, kernel_counts, padding, value):
    source = torch.arange(1.0, 49).view(2, 3, 8)
    wanted = torch.full((4, 6, 8), value)
    wanted[1:3, 1:4, 4:] = source[:, :, :4]
    ours = run("boxes", source, padding)
    torch.testing.assert_close(ours, wanted, rtol=0, atol=0, equal_nan=True)
    kernel_counts.executed(90)
