"""The matmuls of soft cross entropy as a GPU makes them, on the CPU, against float64."""

import pytest
import torch
from fastvlp.kernels import storage_factor
from fastvlp_tests import cuda_passes
from fastvlp_tests.soft_cross_entropy_cases import LEAVES, draw, run
from fastvlp_tests.tolerance import assert_as_accurate

from fastvlp.ops import soft_cross_entropy, soft_cross_entropy_reference
from fastvlp.ops.soft_cross_entropy import matmuls, register


def rows_pass(logits, *inputs, gradient):
    """The Triton kernel's contract, by the CPU's pass: derivatives are stored times a factor."""
    wide = torch.empty_like(logits) if gradient.numel() else gradient.float()
    torch.ops.fastvlp.soft_cross_entropy_rows(logits.clone(), *inputs, wide)
    gradient.copy_(wide * storage_factor(gradient.dtype))


@pytest.fixture
def gpu_matmuls(monkeypatch):
    monkeypatch.setattr(matmuls, "on_gpu", lambda _: True)
    monkeypatch.setattr(
        register, "_pass", lambda _: lambda *inputs: rows_pass(*inputs[:-1], gradient=inputs[-1])
    )
    with cuda_passes.wide_matmuls():
        yield


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "rows, options",
    [
        (1000, {}),
        (4096, {}),
        (4096, {"workspace_bytes": 1 << 16}),
        (1000, {"reduction": "none"}),
        (1000, {"reduction": "none", "workspace_bytes": 1 << 16}),
    ],
)
def test_gradients(gpu_matmuls, dtype, rows, options):
    case = draw(rows, 16, 40, dtype, "cpu")
    upstream = None
    if options.get("reduction") == "none":
        upstream = torch.rand(rows, generator=torch.Generator().manual_seed(1)) / rows
    reference = {name: value for name, value in options.items() if name == "reduction"}
    ours = run(soft_cross_entropy, case, upstream, **options)
    eager = run(soft_cross_entropy_reference, case, upstream, **reference)
    exact = run(soft_cross_entropy_reference, case.to(torch.float64), upstream, **reference)
    for name, *found in zip(("loss", *LEAVES), ours, eager, exact, strict=True):
        assert_as_accurate(name, *found)
