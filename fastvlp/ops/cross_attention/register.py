"""Registers the attention operators with torch: shapes for tracing, kernels for CUDA tensors.

The schemas and the CPU kernels come with the compiled library (csrc/schema.cpp).
"""

import torch

from .. import compiled
from .._core.implement import implement

_SECOND_DERIVATIVE = (
    "cross_attention has no second derivative; for one, call cross_attention_reference, which "
    "plain autograd differentiates twice"
)


def _forward_fake(q, k, v, *_):
    statistics = q.new_empty((2, q.shape[1], q.shape[0]), dtype=torch.float32)
    return q.new_empty(q.shape), statistics


def _gradient_fake(t):
    """On the CPU in the layout of `t` if it is dense, as autograd keeps gradients."""
    like = torch.empty_like(t)
    dense = like.stride() == t.stride()
    return like if dense and t.device.type == "cpu" else t.new_empty(t.shape)


def _backward_fake(grad, q, k, v, *_):
    return tuple(_gradient_fake(t) for t in (q, k, v))


def _names(options) -> dict:
    return dict(
        zip(("scale", "dropout_p", "causal", "max_seqlen_q", "max_seqlen_k"), options, strict=True)
    )


def _forward_triton(q, k, v, cu_q, cu_k, key_mask, seed, *options):
    from ...kernels.cross_attention import cross_attention_forward

    return cross_attention_forward(q, k, v, cu_q, cu_k, key_mask, seed, **_names(options))


def _backward_triton(grad, q, k, v, out, statistics, cu_q, cu_k, key_mask, seed, *options):
    from ...kernels.cross_attention.backward import cross_attention_backward

    return cross_attention_backward(
        grad, q, k, v, out, statistics, cu_q, cu_k, key_mask, seed, **_names(options)
    )


def _no_second_derivative(ctx, *grads):
    raise RuntimeError(_SECOND_DERIVATIVE)


def register_operators() -> None:
    """Called once when `fastvlp.ops` is imported; does nothing where there are no schemas."""
    if compiled.missing_schemas():
        return
    for name, fake, triton in (
        ("cross_attention_forward", _forward_fake, _forward_triton),
        ("cross_attention_backward", _backward_fake, _backward_triton),
    ):
        torch.library.register_fake(f"fastvlp::{name}", fake)
        implement(name, triton, "CUDA")
    torch.library.register_autograd("fastvlp::cross_attention_backward", _no_second_derivative)
