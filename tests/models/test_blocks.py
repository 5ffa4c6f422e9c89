"""The models' blocks look where they may; the activation of CLIP."""

import pytest
import torch

from fastvlp.models import layers
from fastvlp.nn.feed_forward import quick_gelu


@pytest.mark.parametrize("causal", [False, True])
def test_attention_never_looks_ahead(causal):
    """The derivative of output i by input j > i is zero exactly where, and only where, causal."""
    torch.manual_seed(0)
    model = layers.Transformer(width=16, layers=3, heads=2, hidden=64, activation="gelu").double()
    x = torch.randn(1, 6, 16, dtype=torch.float64, requires_grad=True)
    out = model(x, causal=causal)
    for i in range(6):
        (gradient,) = torch.autograd.grad(out[0, i].sum(), x, retain_graph=True)
        seen = gradient[0].abs().amax(dim=1) > 0
        assert seen.tolist() == [j <= i or not causal for j in range(6)]


def test_quick_gelu():
    x = torch.linspace(-8, 8, 101, dtype=torch.float64)
    torch.testing.assert_close(quick_gelu(x), x / (1 + torch.exp(-1.702 * x)), rtol=1e-14, atol=0)
