"""The models' attention, layer norm and activation against float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_as_accurate, epsilon

from fastvlp.models import layers

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def plain(query, key, value, causal):
    """Softmax attention in the dtype of its inputs."""
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    return scores.softmax(dim=-1) @ value


def with_gradients(function, tensors, upstream):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    out.backward(upstream.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    length=st.integers(1, 40),
    head_dim=st.sampled_from([1, 8, 64, 80]),
    causal=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    scale=st.sampled_from([0.1, 1.0, 8.0]),
    seed=st.integers(0, 99),
)
def test_products_and_gradients(batch, heads, length, head_dim, causal, dtype, scale, seed):
    """Short sequences in half precision with gradients do without PyTorch's fused kernel."""
    generator = torch.Generator().manual_seed(seed)
    shape = (4, batch, length, heads, head_dim)
    drawn = (scale * torch.randn(shape, generator=generator)).to(dtype).transpose(2, 3)
    *qkv, upstream = drawn
    ours = with_gradients(lambda *a: layers.attention(*a, causal=causal), qkv, upstream)
    eager = with_gradients(lambda *a: plain(*a, causal), qkv, upstream)
    exact = with_gradients(lambda *a: plain(*a, causal), [t.double() for t in qkv], upstream)
    query, key, value = (t.double() for t in qkv)
    # Gradients of the scores are differences of these, so their rounding stays where all cancel.
    weight_gradient = (upstream.double() @ value.transpose(-1, -2)).abs().max() * head_dim**-0.5
    size = {"dq": weight_gradient * key.abs().max(), "dk": weight_gradient * query.abs().max()}
    for name, o, e, x in zip(("out", "dq", "dk", "dv"), ours, eager, exact, strict=True):
        assert o.dtype == dtype
        largest = max(x.abs().max(), size.get(name, 0)).item()
        assert_as_accurate(name, o, e, x, floor=epsilon(dtype) * largest * x.numel() ** 0.5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 0.02)]
)
@pytest.mark.parametrize("length", [7, 300])
def test_every_way_computes_the_same(causal, dtype, tolerance, length):
    """Whichever kernel runs, with gradients or without."""
    torch.manual_seed(0)
    qkv = torch.randn(3, 2, 3, length, 16).to(dtype)
    exact = plain(*qkv.double(), causal)
    for needs_grad in (False, True):
        out = layers.attention(*qkv.requires_grad_(needs_grad), causal=causal)
        assert out.dtype == dtype
        assert (out - exact).norm() <= tolerance * exact.norm()


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
    norm = layers.LayerNorm(width)
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


def test_quick_gelu():
    x = torch.linspace(-8, 8, 101, dtype=torch.float64)
    torch.testing.assert_close(
        layers.quick_gelu(x), x / (1 + torch.exp(-1.702 * x)), rtol=1e-14, atol=0
    )
