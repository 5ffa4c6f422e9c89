"""Losses whose forward pass computed the gradients already: scale them by the upstream one."""

from collections.abc import Callable

import torch

from ..._autograd import Function
from .checks import readable

SECOND_DERIVATIVE = (
    "the contrastive losses have no second derivative; for one, call contrastive_reference, "
    "sigmoid_contrastive_reference or momentum_contrastive_reference, which plain autograd "
    "differentiates twice"
)


def wants_gradients(*tensors: torch.Tensor | None) -> bool:
    """Whether a backward pass may follow, also inside of torch.func's transforms."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def once_differentiable(function: Callable, *args):
    """function(*args) in a backward pass; asking for its own derivative is refused.

    It also makes operators without a rule of their own known to torch.func's transforms.
    """
    # Without gradients of it nobody can ask for its derivative; and the compiler takes no Function
    # inside the backward pass of another.
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(*args)
    return _OnceDifferentiable.apply(function, *args)


def scaled_gradients(upstream: torch.Tensor, *inputs_and_gradients) -> tuple[torch.Tensor, ...]:
    """(upstream, *inputs, *gradients) -> gradients times upstream, not further differentiable.

    Takes the inputs so that asking for a second derivative with respect to them is refused, too.
    """
    return once_differentiable(_scale, upstream, *inputs_and_gradients)


class _OnceDifferentiable(Function):
    @staticmethod
    def forward(function, *args):
        return function(*args)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(SECOND_DERIVATIVE)


def _scale(upstream, *inputs_and_gradients):
    gradients = inputs_and_gradients[len(inputs_and_gradients) // 2 :]
    if readable(upstream):  # there a factor without dimensions is not rounded to the other's dtype
        return tuple(g * upstream for g in gradients)
    return tuple((g.float() * upstream).to(g.dtype) for g in gradients)
