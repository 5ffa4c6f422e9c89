"""fastvlp/_autograd.py: a Function binds what `apply` is given as torch's own Function does."""

import inspect

import pytest
import torch

from fastvlp import _autograd


class Scale(_autograd.Function):
    @staticmethod
    def forward(x, factor, offset=1.0):
        return factor * x + offset

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.factor, ctx.offset = inputs

    @staticmethod
    def backward(ctx, grad):
        return ctx.factor * grad, None, None


@pytest.mark.parametrize("rest", [(3.0, 2.0), (3.0,)])
def test_arguments_reach_forward_and_context(rest):
    x = torch.ones(2, requires_grad=True)
    found = Scale.apply(x, *rest)
    assert found.tolist() == [3.0 + (rest[1] if len(rest) > 1 else 1.0)] * 2
    found.sum().backward()
    assert x.grad.tolist() == [3.0, 3.0]


def test_too_many_arguments_are_refused():
    with pytest.raises(TypeError, match="too many positional"):
        Scale.apply(torch.ones(2), 1.0, 2.0, 3.0)


def test_the_signature_is_that_of_forward():
    found = inspect.signature(Scale.forward)
    assert str(found) == "(x, factor, offset=1.0)"
    bound = found.bind(1, 2, 3)
    bound.apply_defaults()
    assert (bound.args, dict(bound.kwargs)) == ((1, 2, 3), {})


def test_it_is_differentiated_by_transforms():
    gradient = torch.func.grad(lambda x: Scale.apply(x, 2.0, 0.0).sum())
    assert gradient(torch.ones(2)).tolist() == [2.0, 2.0]
