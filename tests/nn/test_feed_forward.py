"""Norm with linear layer, and the feed-forward part: against float64, and what they keep."""

import pytest
import torch
import torch.nn.functional as F
from fastvlp_tests.leaves import with_gradients
from fastvlp_tests.tolerance import assert_as_accurate, epsilon
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlp.nn import Dropout
from fastvlp.nn.feed_forward import ACTIVATIONS, Norm, feed_forward, norm_linear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-6


def ours(activation, normed):
    def run(x, *parameters):
        if activation is None:
            gain, shift, weight, bias = parameters
            return norm_linear(x, Norm(gain, shift, EPS), weight, bias)
        gain, shift, *rest = parameters if normed else (None, None, *parameters)
        return feed_forward(x, Norm(gain, shift, EPS) if normed else None, *rest, activation)

    return run


def plain(activation, normed):
    def run(x, *parameters):
        if normed:
            gain, shift, *parameters = parameters
            wide = x if x.dtype == torch.float64 else x.float()
            gain, shift = gain.to(wide.dtype), shift.to(wide.dtype)
            x = F.layer_norm(wide, x.shape[-1:], gain, shift, EPS)
        x = F.linear(x.to(parameters[0].dtype), *parameters[:2])
        if activation is None:
            return x
        return F.linear(ACTIVATIONS[activation](x), *parameters[2:])

    return run


def random_inputs(shape, width, hidden, activation, normed, dtype, scale=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)

    def r(*size):
        return torch.randn(size, generator=g)

    parameters = [1 + 0.3 * r(width), 0.3 * r(width)] if normed else []
    parameters += [r(hidden, width) / width**0.5, r(hidden)]
    if activation is not None:
        parameters += [r(width, hidden) / hidden**0.5, r(width)]
    out = width if activation is not None else hidden
    x, upstream = scale * r(*shape, width), r(*shape, out)
    return [t.to(dtype) for t in (x, *parameters)], upstream.to(dtype)


@given(
    shape=st.sampled_from([(0,), (1,), (7,), (2, 5), (3, 0), (2, 3, 4)]),
    sizes=st.sampled_from([(1, 1), (8, 3), (33, 130)]),
    form=st.sampled_from([(None, True), *((a, n) for a in ACTIVATIONS for n in (True, False))]),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_against_float64(shape, sizes, form, dtype, scale, seed):
    leaves, upstream = random_inputs(shape, *sizes, *form, dtype, scale, seed)
    got = with_gradients(ours(*form), leaves, upstream)
    eager = with_gradients(plain(*form), leaves, upstream)
    exact = with_gradients(plain(*form), [t.double() for t in leaves], upstream.double())
    for i, (o, e, r) in enumerate(zip(got, eager, exact, strict=True)):
        assert o.dtype == dtype
        floor = epsilon(dtype) * r.norm().item()
        assert_as_accurate(f"result {i}", o, e, r, floor=floor)


@pytest.mark.parametrize("form", [(None, True), ("gelu", True), ("quick_gelu", False)])
def test_gradcheck(form):
    leaves, _ = random_inputs((3,), 5, 4, *form, torch.float64)
    assert torch.autograd.gradcheck(ours(*form), [t.requires_grad_() for t in leaves])


@pytest.mark.parametrize("form", [(None, True), ("gelu", True), ("gelu", False)])
@pytest.mark.parametrize("strided", [False, True])
def test_float32_is_bit_for_bit_the_plain_layers(form, strided):
    leaves, upstream = random_inputs((4, 6), 16, 24, *form, torch.float32)
    if strided:
        leaves[0] = leaves[0].transpose(0, 1).contiguous().transpose(0, 1)
    got = with_gradients(ours(*form), leaves, upstream)
    expected = with_gradients(plain(*form), leaves, upstream)
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


@pytest.mark.parametrize("form", [(None, True), ("gelu", True), ("gelu", False)])
def test_autocast(form):
    leaves, upstream = random_inputs((4, 6), 16, 24, *form, torch.float32)

    def cast(run):
        def inner(*leaves):
            with torch.autocast("cpu", torch.bfloat16):
                return run(*leaves)

        return inner

    def eager(x, *parameters):  # the modules, as autocast treats them
        if form[1]:
            gain, shift, *parameters = parameters
            x = F.layer_norm(x, x.shape[-1:], gain, shift, EPS)
        x = F.linear(x, *parameters[:2])
        return x if form[0] is None else F.linear(ACTIVATIONS[form[0]](x), *parameters[2:])

    upstream = upstream.bfloat16()
    got = with_gradients(cast(ours(*form)), leaves, upstream)
    peer = with_gradients(cast(eager), leaves, upstream)
    exact = with_gradients(plain(*form), [t.double() for t in leaves], upstream.double())
    assert got[0].dtype == torch.bfloat16
    for i, (o, e, r) in enumerate(zip(got, peer, exact, strict=True)):
        assert o.dtype == e.dtype
        assert_as_accurate(f"result {i}", o, e, r, floor=epsilon(torch.bfloat16) * r.norm().item())


def kept_bytes(run, leaves):
    total, own = [], {t.untyped_storage().data_ptr() for t in leaves}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            total.append(t.untyped_storage().nbytes())
            own.add(t.untyped_storage().data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run(*[t.requires_grad_() for t in leaves])
    return sum(total)


def test_only_the_inner_activation_is_kept():
    rows, width, hidden = 50, 32, 128
    statistics = 2 * rows * 4
    leaves, _ = random_inputs((rows,), width, hidden, "gelu", True, torch.float32)
    assert kept_bytes(ours("gelu", True), leaves) == rows * hidden * 4 + statistics
    leaves, _ = random_inputs((rows,), width, hidden, None, True, torch.float32)
    assert kept_bytes(ours(None, True), leaves) == statistics


def with_dropout(p):
    def run(x, gain, shift, *rest):
        torch.manual_seed(5)
        return feed_forward(x, Norm(gain, shift, EPS), *rest, dropout_p=p)

    return run


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_dropout_is_that_of_the_plain_layers(p):
    leaves, upstream = random_inputs((4, 6), 16, 24, "gelu", True, torch.float32)

    def layers(x, gain, shift, weight1, bias1, weight2, bias2):
        torch.manual_seed(5)
        x = F.layer_norm(x, x.shape[-1:], gain, shift, EPS)
        return F.linear(Dropout(p)(F.gelu(F.linear(x, weight1, bias1))), weight2, bias2)

    got = with_gradients(with_dropout(p), leaves, upstream)
    expected = with_gradients(layers, leaves, upstream)
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))
    without = with_gradients(with_dropout(0.0), leaves, upstream)
    assert not torch.equal(got[0], without[0])


def test_dropout_keeps_one_byte_a_value():
    rows, width, hidden = 50, 32, 128
    leaves, _ = random_inputs((rows,), width, hidden, "gelu", True, torch.float32)
    assert kept_bytes(with_dropout(0.1), leaves) == rows * hidden * 5 + 2 * rows * 4


def test_dropout_gradcheck_and_errors():
    leaves, _ = random_inputs((3,), 5, 4, "gelu", True, torch.float64)
    assert torch.autograd.gradcheck(with_dropout(0.4), [t.requires_grad_() for t in leaves])
    with pytest.raises(ValueError, match="dropout_p: expected a probability, got 1.5"):
        with_dropout(1.5)(*leaves)


def test_frozen_parameters_get_no_gradient():
    leaves, upstream = random_inputs((5,), 8, 16, "gelu", True, torch.float32)
    leaves = [t.requires_grad_(i in (0, 5)) for i, t in enumerate(leaves)]
    ours("gelu", True)(*leaves).backward(upstream)
    assert [t.grad is not None for t in leaves] == [i in (0, 5) for i in range(7)]
    expected = with_gradients(plain("gelu", True), [t.detach() for t in leaves], upstream)
    assert torch.equal(leaves[0].grad, expected[1]) and torch.equal(leaves[5].grad, expected[6])


def test_compiles_whole_and_refuses_what_it_cannot():
    leaves, upstream = random_inputs((5,), 8, 16, "gelu", True, torch.float32)
    compiled = torch.compile(ours("gelu", True), fullgraph=True, backend="aot_eager")
    got = with_gradients(compiled, leaves, upstream)
    expected = with_gradients(ours("gelu", True), leaves, upstream)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e)
    with pytest.raises(ValueError, match="activation: expected one of .*got 'relu'"):
        ours("relu", True)(*leaves)
    x = leaves[0].requires_grad_()
    (first,) = torch.autograd.grad(ours("gelu", True)(*leaves).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()
