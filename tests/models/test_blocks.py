"""The models' blocks look where they may; the activation of CLIP; weights initialised by width."""

import pytest
import torch

from fastvlp.models import albef, vilt
from fastvlp.models.clip import transformer as layers
from fastvlp.nn.feed_forward import quick_gelu


@pytest.mark.parametrize("causal", [False, True])
def test_attention_never_looks_ahead(causal):
    """The derivative of output i with respect to input j > i is zero exactly where, and only where,
    causal."""
    torch.manual_seed(0)
    model = layers.Transformer(width=16, layers=3, heads=2, hidden=64, activation="gelu").double()
    x = torch.randn(1, 6, 16, dtype=torch.float64, requires_grad=True)
    out = model(x, causal=causal)
    for i in range(6):
        (gradient,) = torch.autograd.grad(out[0, i].sum(), x, retain_graph=True)
        attended = gradient[0].abs().amax(dim=1) > 0
        assert attended.tolist() == [j <= i or not causal for j in range(6)]


def test_quick_gelu():
    x = torch.linspace(-8, 8, 101, dtype=torch.float64)
    torch.testing.assert_close(quick_gelu(x), x / (1 + torch.exp(-1.702 * x)), rtol=1e-14, atol=0)


def test_initialisation_by_width():
    torch.manual_seed(0)
    text = albef.create("tiny", init_by_width=True).student.text_encoder.bert["encoder"]["layer"][0]
    joint = vilt.create("mini", init_by_width=True).transformer.blocks[0].mlp
    pairs = (
        (text.intermediate["dense"].weight, text.output.dense.weight),
        (joint.fc1.weight, joint.fc2.weight),
    )
    # The standard deviation of n values varies by 1 / sqrt(2 n) of itself.
    for widens, narrows in pairs:
        for weight, wanted in ((widens, 1.0), (narrows, 0.7)):
            found = weight.std().item() * weight.shape[1] ** 0.5
            assert abs(found / wanted - 1) < 5 * (2 * weight.numel()) ** -0.5
