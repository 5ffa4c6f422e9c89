"""Registers the word-patch alignment with torch: shapes for tracing, Triton for CUDA tensors.

The schemas and the CPU kernels come with the compiled library (csrc/schema.cpp).
"""

import torch

from .. import compiled
from .._core.implement import implement

SECOND_DERIVATIVE = (
    "word_patch_alignment has no second derivative; for one, call word_patch_alignment_reference, "
    "which plain autograd differentiates twice"
)


def _fake(x, y, x_padding, y_padding, beta, iterations, inner):
    pairs, words, patches = x.shape[0], x.shape[1], y.shape[1]

    def empty(*shape):
        return x.new_empty(shape, dtype=torch.float32)

    return (
        empty(pairs), empty(pairs, words, patches), empty(2, pairs, words), empty(2, pairs, patches)
    )  # fmt: skip


def _gradients_fake(upstream, x, y, plan, x_rows, y_rows):
    return x.new_empty(x.shape), y.new_empty(y.shape)


def _triton(x, y, x_padding, y_padding, beta, iterations, inner):
    from ...kernels.word_patch_alignment import word_patch_alignment

    return word_patch_alignment(
        x, y, x_padding, y_padding, beta=beta, iterations=iterations, inner=inner
    )


def _gradients_triton(upstream, x, y, plan, x_rows, y_rows):
    from ...kernels.word_patch_alignment import word_patch_alignment_gradients

    return word_patch_alignment_gradients(upstream, x, y, plan, x_rows, y_rows)


def _no_second_derivative(ctx, *grads):
    raise RuntimeError(SECOND_DERIVATIVE)


def register_operators() -> None:
    """Called once when `fastvlp.ops` is imported; does nothing where there are no schemas."""
    if compiled.missing_schemas():
        return
    name = "word_patch_alignment"
    torch.library.register_fake(f"fastvlp::{name}", _fake)
    torch.library.register_fake(f"fastvlp::{name}_gradients", _gradients_fake)
    implement(name, _triton, "CUDA")
    implement(f"{name}_gradients", _gradients_triton, "CUDA")
    torch.library.register_autograd(f"fastvlp::{name}_gradients", _no_second_derivative)
