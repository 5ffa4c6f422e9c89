"""Registers the contrastive operators with torch: shapes for tracing, kernels for CUDA tensors.

The schemas and the CPU kernels come with the compiled library (csrc/schema.cpp). On CUDA tensors
Triton runs or the compiled passes, whichever `fastvlp.ops.explain` names.
"""

import torch

from ...kernels import align
from .. import compiled
from .._core.dispatch import choose
from .._core.implement import implement
from .._core.saved_gradients import SECOND_DERIVATIVE
from . import cuda


def _statistics_fake(x, y, scale, kept, offset, rows, cols, *_):
    def lse(n):
        return scale.new_empty(n, dtype=torch.float64)

    positive = scale.new_empty(x.shape[0], dtype=torch.float32)
    return lse(x.shape[0] if rows else 0), lse(y.shape[0] if cols else 0), positive


def _gradients_fake(x, y, scale, *_):
    return x.new_empty(x.shape), y.new_empty(y.shape), scale.new_empty((), dtype=torch.float32)


def _loss_fake(x, y, scale, kept, rows, cols, *_):
    statistics = scale.new_empty((rows + cols + 1, x.shape[0]), dtype=torch.float64)
    return scale.new_empty((), dtype=torch.float32), statistics


def _sigmoid_fake(x, y, scale, bias, weight, offset, gradients, *_):
    def scalar():
        return scale.new_empty((), dtype=torch.float32)

    def gradient(t):
        return t.new_empty((t.shape[0] if gradients else 0, t.shape[1]))

    return scalar(), gradient(x), gradient(y), scalar(), scalar()


def _statistics_triton(x, y, scale, kept, offset, rows, cols, *_):
    from ...kernels.contrastive import contrastive_statistics

    row_negatives, col_negatives, positive = contrastive_statistics(
        x, y, scale, offset=offset, rows=rows, cols=cols
    )
    none = scale.new_empty(0, dtype=torch.float64)
    return row_negatives if rows else none, col_negatives if cols else none.clone(), positive


def _gradients_triton(
    x, y, scale, row_lse, col_lse, positive_gradient, weights, kept, offset,
    block_rows, block_cols, keep_blocks, chunk_rows, chunk_cols,
):  # fmt: skip
    from ...kernels.contrastive.backward import contrastive_gradients

    return contrastive_gradients(
        x,
        y,
        scale,
        row_lse if row_lse.numel() else None,
        col_lse if col_lse.numel() else None,
        positive_gradient,
        weights,
        offset=offset,
        workspace_bytes=_workspace(x, y, block_rows * chunk_rows),
    )


def _sigmoid_triton(
    x, y, scale, bias, weight, offset, gradients, block_rows, block_cols, chunk_rows, chunk_cols
):
    from ...kernels.contrastive.sigmoid import sigmoid_contrastive

    result = sigmoid_contrastive(
        x,
        y,
        scale,
        bias,
        offset=offset,
        weight=weight,
        need_gradients=gradients,
        workspace_bytes=_workspace(x, y, block_rows * chunk_rows),
    )
    loss, bias_gradient = result.loss_sum * weight, result.g_sum * weight
    if not gradients:
        return (
            loss,
            x.new_empty(0, x.shape[1]),
            y.new_empty(0, y.shape[1]),
            loss.clone(),
            bias_gradient,
        )
    return loss, result.dx, result.dy, result.dscale, bias_gradient


def _workspace(x: torch.Tensor, y: torch.Tensor, rows: int) -> int:
    """What a chunk of so many rows, the plan's, takes."""
    return rows * align(len(y)) * x.element_size()


def _on_cuda(op, triton, native):
    def run(x, y, *args):
        # Triton says itself what it lacks where neither of the two can run.
        kernel = native if choose(op, x, y) == "native" else triton
        return kernel(x, y, *args)

    return run


def _no_second_derivative(ctx, *grads):
    raise RuntimeError(SECOND_DERIVATIVE)


def register_operators() -> None:
    """Called once when `fastvlp.ops` is imported; does nothing where there are no schemas."""
    if compiled.missing_schemas():
        return
    for name, op, fake, triton, native in (
        (
            "contrastive_statistics",
            "contrastive",
            _statistics_fake,
            _statistics_triton,
            cuda.statistics,
        ),
        (
            "contrastive_gradients",
            "contrastive",
            _gradients_fake,
            _gradients_triton,
            cuda.gradients,
        ),
        (
            "contrastive_sigmoid",
            "sigmoid_contrastive",
            _sigmoid_fake,
            _sigmoid_triton,
            cuda.sigmoid,
        ),
    ):
        torch.library.register_fake(f"fastvlp::{name}", fake)
        implement(name, _on_cuda(op, triton, native), "CUDA")
        if name != "contrastive_statistics":  # called by autograd functions only, never through
            torch.library.register_autograd(f"fastvlp::{name}", _no_second_derivative)
    # The loss of one process on a CPU, which needs nothing between the passes of these two.
    torch.library.register_fake("fastvlp::contrastive_loss", _loss_fake)
    torch.library.register_fake("fastvlp::contrastive_loss_gradients", _gradients_fake)
    # The compiled passes only write into arguments.
    for name in ("statistics", "gradient", "sigmoid"):
        torch.library.register_fake(f"fastvlp::contrastive_cuda_{name}", lambda *_: None)
