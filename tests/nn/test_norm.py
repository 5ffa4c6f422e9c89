"""Layer norm against float64."""

import torch
import torch.nn.functional as F
from fastvlp_tests.leaves import with_gradients
from fastvlp_tests.tolerance import assert_as_accurate, epsilon
from hypothesis import given
from hypothesis import strategies as st

from fastvlp.nn import LayerNorm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(0, 5),
    width=st.sampled_from([1, 7, 192]),
    offset=st.sampled_from([0.0, 30.0]),
    autocast=st.booleans(),
    seed=st.integers(0, 99),
)
def test_layer_norm(dtype, rows, width, offset, autocast, seed):
    """Statistics in float32 whatever the dtype; the result in the dtype of the input."""
    generator = torch.Generator().manual_seed(seed)
    norm = LayerNorm(width)
    with torch.no_grad():
        norm.weight.normal_(generator=generator)
        norm.bias.normal_(generator=generator)
    x = (torch.randn(rows, width, generator=generator) + offset).to(dtype)
    upstream = torch.randn(rows, width, generator=generator).to(dtype)
    wide = [norm.weight.detach().double(), norm.bias.detach().double()]
    parameters = [norm.weight.detach(), norm.bias.detach()]

    def ours(x, weight, bias):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x,))

    got = with_gradients(ours, [x, *parameters], upstream)
    assert got[0].dtype == dtype
    eager = with_gradients(
        lambda x, w, b: F.layer_norm(x.float(), (width,), w, b, 1e-5).to(dtype),
        [x, *parameters],
        upstream,
    )
    exact = with_gradients(
        lambda x, w, b: F.layer_norm(x, (width,), w, b, 1e-5), [x.double(), *wide], upstream
    )
    for name, o, e, r in zip(("out", "dx", "dweight", "dbias"), got, eager, exact, strict=True):
        floor = epsilon(dtype) * r.norm().item()
        assert_as_accurate(name, o, e, r, floor=floor)
