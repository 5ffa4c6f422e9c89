"""Gradients that wait for the upstream one are scaled by it, and rounded once."""

import pytest
import torch

from fastvlp.ops._core.saved_gradients import scaled_gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("upstream", [1.0, 0.7, 65536.0 / 3])
def test_the_upstream_gradient_is_not_rounded_to_their_dtype(dtype, upstream):
    factor = torch.tensor(upstream)
    assert upstream == 1.0 or factor.to(torch.bfloat16) != factor
    gradients = torch.randn(3, 40).to(dtype) / 1000, torch.tensor(0.3)
    with torch.no_grad():
        found = scaled_gradients(factor, *gradients, *gradients)
    for ours, gradient in zip(found, gradients, strict=True):
        assert ours.dtype == gradient.dtype
        assert torch.equal(ours, (gradient.float() * factor).to(gradient.dtype))
