"""The pairwise sigmoid loss of SigLIP in one pass without the N x N matrix."""

import torch
import torch.distributed as dist
import torch.nn.functional as F

from ..._autograd import Function
from ...distributed import reporting, spans_ranks
from .._core.backends import unit_stride
from .._core.checks import as_scalar, check_features, check_workspace, local
from .._core.dispatch import choose, explain, register_backends
from .._core.implement import without_autocast
from .._core.saved_gradients import scaled_gradients, wants_gradients
from .checks import CANDIDATES, preferred_backend
from .gather import COMM_DTYPES
from .group import Distributed
from .plan import plan_for


def sigmoid_contrastive(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    logit_scale: torch.Tensor | float,
    logit_bias: torch.Tensor | float = 0.0,
    *,
    workspace_bytes: int | None = None,
    group: dist.ProcessGroup | None = None,
    comm_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Sigmoid loss over all N^2 pairs, (image_features[i], text_features[i]) the positive ones.

        z_ij = s <x_i, y_j> + b,  t_ij = 1 where i = j, else -1
        loss = -1/N sum_ij log sigmoid(t_ij z_ij)

    Source: Zhai et al., "Sigmoid Loss for Language Image Pre-Training", arXiv 2303.15343, section
    3.2.

    Cost: the loss is a sum over elements, so the forward pass computes the gradients as well: three
    GEMMs of 2 N^2 D FLOP in all, one where no gradient is wanted. Memory beyond the gradients: at
    most about `workspace_bytes` plus a few MB for each thread. Precision is as for `contrastive`.

    Args:
        image_features, text_features: [N, D], float32, bfloat16 or float16 (float64 through the
            reference), normalised by the caller if the loss is to be over cosines. The loss of no
            pairs is 0, with zero gradients.
        logit_scale: s, already exponentiated: a number or a tensor of one element.
        logit_bias: b, a number or a tensor of one element.
        workspace_bytes: bound on the extra memory; None as for `fastvlp.ops.contrastive`.
        group: a process group whose ranks each hold a part of the global batch, as for
            `fastvlp.ops.contrastive`. The text features pass round a ring.
        comm_dtype: with `group`, the dtype in which features and their gradients are sent.

    Returns:
        The loss, a zero-dimensional float32 tensor (float64 for float64 features), differentiable
        once with respect to the features, the scale and the bias. With `group` W/N times this
        rank's share, as for `fastvlp.ops.contrastive`.

    Raises:
        TypeError, ValueError, RuntimeError: as `fastvlp.ops.contrastive`.

    Examples:
        >>> import torch
        >>> from torch.nn.functional import normalize
        >>> images, texts = (normalize(torch.randn(8, 16), dim=-1).requires_grad_() for _ in "ab")
        >>> from fastvlp.ops import sigmoid_contrastive
        >>> sigmoid_contrastive(images, texts, 10.0, -10.0).backward()
        >>> texts.grad.shape
        torch.Size([8, 16])
    """
    distributed = spans_ranks(group)
    with reporting(group, "sigmoid_contrastive"):
        image_features = local("image_features", image_features)
        text_features = local("text_features", text_features)
        check_features(image_features, text_features)
        check_workspace(workspace_bytes)
        if comm_dtype not in COMM_DTYPES:
            raise ValueError(f"comm_dtype: expected one of {COMM_DTYPES}, got {comm_dtype!r}")
        scale = as_scalar("logit_scale", logit_scale, image_features, finite=not distributed)
        bias = as_scalar("logit_bias", logit_bias, image_features, finite=not distributed)
        backend = choose("sigmoid_contrastive", image_features, text_features)
        if distributed and backend == "reference":
            raise TypeError(
                f"image_features: the loss over a group needs a kernel; "
                f"{explain('sigmoid_contrastive', image_features, text_features)}"
            )
        features = unit_stride(image_features), unit_stride(text_features)
    gradients = wants_gradients(*features, scale, bias)
    if distributed and group is not None:
        return Distributed.apply(
            torch.ops.fastvlp.sigmoid_contrastive_distributed, 4, *features, scale, bias,
            group.group_name, comm_dtype, gradients, workspace_bytes,
        )[0]  # fmt: skip
    if backend == "reference" or not len(image_features):
        return without_autocast(sigmoid_contrastive_reference)(
            image_features, text_features, scale, bias
        )
    return _SigmoidContrastive.apply(*features, scale, bias, gradients, workspace_bytes)[0]


def sigmoid_contrastive_reference(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    logit_scale: torch.Tensor | float,
    logit_bias: torch.Tensor | float = 0.0,
) -> torch.Tensor:
    """The definition of `sigmoid_contrastive`: any floating dtype, N^2 memory."""
    logits = logit_scale * image_features @ text_features.T + logit_bias
    if logits.dtype != torch.float64:
        logits = logits.float()
    signs = 2 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device) - 1
    return -F.logsigmoid(signs * logits).sum() / max(len(logits), 1)


class _SigmoidContrastive(Function):
    """The loss and its gradients, for backward."""

    @staticmethod
    def forward(x, y, scale, bias, gradients, workspace_bytes):
        n = x.shape[0]
        plan = plan_for(x, n, workspace_bytes, keep=False)
        return torch.ops.fastvlp.contrastive_sigmoid(
            x, y, scale, bias, 1.0 / n, 0, gradients, plan.block_rows, plan.block_cols,
            plan.chunk_rows, plan.chunk_cols,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        _, *gradients = outputs
        ctx.mark_non_differentiable(*gradients)
        ctx.set_materialize_grads(False)  # of the other outputs: zeros as large as they are
        ctx.save_for_backward(*inputs[:4], *gradients)

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 6
        return *scaled_gradients(grad, *ctx.saved_tensors), None, None


register_backends(
    "sigmoid_contrastive",
    example={"image_features": (2, 8), "text_features": (2, 8)},
    first=preferred_backend,
    **CANDIDATES,
)
