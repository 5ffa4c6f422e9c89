"""The softmax loss of one process as torch's autograd sees it: on a CPU and on a GPU."""

import torch

from ..._autograd import Function
from .._core.saved_gradients import once_differentiable, wants_gradients
from .._core.workspace import Workspace
from .pairs import log_sum_exp, pair_losses, positive_gradient
from .plan import plan_for


def softmax_loss(
    x: torch.Tensor,
    y: torch.Tensor,
    scale: torch.Tensor,
    direction: str,
    workspace_bytes: int | None,
) -> torch.Tensor:
    """The loss of the pairs (x[i], y[i]), at least one, with rows of unit stride; [] float32."""
    rows, cols = direction != "text_to_image", direction != "image_to_text"
    n = x.shape[0]
    plan = plan_for(x, n, workspace_bytes, wants_gradients(x, y, scale))
    if x.device.type != "cpu":
        return _CudaLoss.apply(x, y, scale, rows, cols, plan)[0]
    # The compiler plans memory itself.
    workspace = None if torch.compiler.is_compiling() else Workspace(plan.kept_floats(n))
    return _CpuLoss.apply(x, y, scale, rows, cols, plan, workspace)[0]


class _CpuLoss(Function):
    """The loss, its statistics, and the logits where no workspace keeps them."""

    @staticmethod
    def forward(x, y, scale, rows, cols, plan, workspace):
        if workspace is None:
            kept = scale.new_empty(plan.kept_floats(x.shape[0]))
        else:
            kept = workspace.floats
        loss, statistics = torch.ops.fastvlp.contrastive_loss(
            x, y, scale, kept, rows, cols, plan.block_rows, plan.block_cols, plan.keep_blocks
        )
        return loss, statistics, *(() if workspace is not None else (kept,))

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        x, y, scale, *ctx.directions, ctx.plan, ctx.workspace = inputs
        _, *saved = outputs
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)  # of the other outputs: zeros as large as they are
        ctx.save_for_backward(x, y, scale, *saved)

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 7
        x, y, scale, statistics, *kept = ctx.saved_tensors
        plan, workspace = ctx.plan, ctx.workspace
        keep_blocks = plan.keep_blocks
        if workspace is not None:
            kept = [workspace.floats]
        if kept[0] is None:  # a second backward pass: the first one released the tiles
            kept, keep_blocks = [scale.new_empty(0)], 0
        dx, dy, dscale = once_differentiable(
            torch.ops.fastvlp.contrastive_loss_gradients, x, y, scale, statistics, grad, kept[0],
            *ctx.directions, plan.block_rows, plan.block_cols, keep_blocks, plan.chunk_rows,
            plan.chunk_cols,
        )  # fmt: skip
        if workspace is not None:
            workspace.release()
        return dx, dy, dscale, None, None, None, None


class _CudaLoss(Function):
    """The loss and its statistics. No logits are kept."""

    @staticmethod
    def forward(x, y, scale, rows, cols, plan):
        *negatives, positive = torch.ops.fastvlp.contrastive_statistics(
            x, y, scale, scale.new_empty(0), 0, rows, cols, plan.block_rows, plan.block_cols, 0
        )
        losses = [
            pair_losses(lse, positive).mean()
            for lse, on in zip(negatives, (rows, cols), strict=True)
            if on
        ]
        return sum(losses) / len(losses), *negatives, positive

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        x, y, scale, _, _, ctx.plan = inputs
        _, *saved = outputs
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)  # of the other outputs: zeros as large as they are
        ctx.save_for_backward(x, y, scale, *saved)

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 6
        x, y, scale, row_negatives, col_negatives, positive = ctx.saved_tensors
        n, plan = x.shape[0], ctx.plan
        share = grad / (n * ((row_negatives.numel() > 0) + (col_negatives.numel() > 0)))
        dx, dy, dscale = once_differentiable(
            torch.ops.fastvlp.contrastive_gradients, x, y, scale,
            log_sum_exp(row_negatives, positive), log_sum_exp(col_negatives, positive),
            positive_gradient(row_negatives, col_negatives, positive, share),
            torch.stack((share, share)), scale.new_empty(0), 0, plan.block_rows,
            plan.block_cols, 0, plan.chunk_rows, plan.chunk_cols,
        )  # fmt: skip
        return dx, dy, dscale, None, None, None
