"""Losses whose forward pass computed the gradients already: scale them by the upstream one."""

import torch

SECOND_DERIVATIVE = (
    "the contrastive losses have no second derivative; for one, call contrastive_reference, "
    "sigmoid_contrastive_reference or momentum_contrastive_reference, which plain autograd "
    "differentiates twice"
)


class ScaledGradients(torch.autograd.Function):
    """(upstream, *inputs, *gradients) -> gradients times upstream.

    Takes the inputs only so that asking for a second derivative reaches its backward, which
    refuses.
    """

    @staticmethod
    def forward(ctx, upstream, *inputs_and_gradients):
        gradients = inputs_and_gradients[len(inputs_and_gradients) // 2 :]
        return tuple((g.float() * upstream).to(g.dtype) for g in gradients)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(SECOND_DERIVATIVE)
