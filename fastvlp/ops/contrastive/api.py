"""The symmetric contrastive loss of CLIP (InfoNCE) without the N x N matrix."""

from contextlib import nullcontext

import torch
import torch.distributed as dist

from ...distributed import reporting, spans_ranks
from .._core.backends import unit_stride
from .._core.checks import as_scalar, check_features, check_workspace, local
from .._core.dispatch import choose, explain, register_backends
from .._core.implement import without_autocast
from .._core.saved_gradients import wants_gradients
from .autograd import softmax_loss
from .checks import CANDIDATES, preferred_backend
from .gather import COMM_DTYPES, SCHEDULES
from .group import DIRECTIONS, Distributed
from .pairs import pair_losses
from .register import register_operators


def contrastive(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    logit_scale: torch.Tensor | float,
    logit_bias: torch.Tensor | float | None = None,
    *,
    direction: str = "both",
    workspace_bytes: int | None = None,
    group: dist.ProcessGroup | None = None,
    schedule: str = "auto",
    comm_dtype: torch.dtype | None = None,
    global_value: bool = False,
) -> torch.Tensor:
    """Contrastive loss over the pairs (image_features[i], text_features[i]).

        z_ij = s <x_i, y_j> + b
        loss = 1/2 mean_i [lse_j z_ij - z_ii] + 1/2 mean_j [lse_i z_ij - z_jj]

    The log-sum-exps are taken over the negatives, j != i, and the positive enters a pair's loss as
    log(1 + exp(lse - z_ii)): a loss of 1e-8 is as exact as its logits.

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision",
    arXiv 2103.00020, section 2.3 and figure 3; van den Oord et al., arXiv 1807.03748, equation 4.

    Cost: one GEMM of 2 N^2 D FLOP forward. A tile of logits serves both directions: its row
    statistics finish image-to-text, its column statistics text-to-image. Backward takes two GEMMs,
    and a third one for those logits that did not fit into `workspace_bytes`. Memory beyond the
    gradients: at most about `workspace_bytes` plus a few MB for each thread. On a GPU no logits are
    kept: backward takes three GEMMs, and forward 64 MB for its statistics.

    The gradient with respect to s costs N D operations, that with respect to b is exactly zero: the
    softmax is invariant to a constant. GEMMs of float32 features have float32 accuracy: where the
    CPU has AMX tiles of bfloat16, each float is split into three of these (bf16x3); on a GPU they
    are cuBLAS's, which follows torch.backends.cuda.matmul.allow_tf32. GEMMs of bfloat16 features
    use bfloat16 multiplications with float32 sums where the CPU has them, else float32; softmax and
    sums are always float32.

    Args:
        image_features: [N, D], float32, bfloat16 or float16 (float64 through the reference);
            normalised by the caller if the loss is to be over cosines. A DTensor has to be
            replicated. The loss of no pairs is 0, with zero gradients.
        text_features: [N, D], same dtype and device.
        logit_scale: s, already exponentiated: a number or a tensor of one element.
        logit_bias: b, a number or a tensor of one element. It changes neither loss nor gradient.
        direction: "both" is the mean of "image_to_text" and "text_to_image".
        workspace_bytes: bound on the extra memory; on a CPU more of it keeps more logits for
            backward, on a GPU it makes chunks taller. None: 288 MB on a CPU; on a GPU 2.5 to 5% of
            the memory that is free at the first call, or more if 4,096 rows take more.
        group: a process group whose ranks each hold a part of the global batch, of any sizes, 0
            included. Every rank calls with its own pairs and the same options, and backpropagates
            the same upstream gradient.
        schedule: with `group`, "gather" (text features all-gathered, N D memory), "ring" (one
            shard at a time, memory for a few local batches) or "auto" (gather while it fits
            next to the workspace).
        comm_dtype: with `group`, the communication dtype of features and their gradients, for
            example torch.bfloat16; None sends features as they are and gradients in float32.
            Statistics are float32 always.
        global_value: with `group`, return the loss of the global batch, the same on every rank, in
            place of this rank's share. Gradients are those of the share either way.

    Returns:
        The loss, a zero-dimensional float32 tensor (float64 for float64 features), differentiable
        once with respect to the features, the scale and the bias. With `group` it is W/N times
        this rank's share of the sum over all N pairs (for equal shards the mean over its own pairs,
        as open_clip's local loss), so that the mean over the W ranks is the loss of the global
        batch and averaging gradients over ranks, as DDP does, gives its exact gradient.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
        RuntimeError: FASTVLP_BACKEND forces an implementation that cannot run, or a second
            derivative is asked for; with `group`, on every rank, when any rank's arguments are
            bad, or its options or its scale differ from the others'.

    Examples:
        >>> import torch
        >>> from torch.nn.functional import normalize
        >>> images, texts = (normalize(torch.randn(8, 16), dim=-1).requires_grad_() for _ in "ab")
        >>> from fastvlp.ops import contrastive
        >>> loss = contrastive(images, texts, 14.3)
        >>> loss.backward()
        >>> loss.shape, images.grad.shape
        (torch.Size([]), torch.Size([8, 16]))
    """
    distributed = spans_ranks(group)
    with reporting(group, "contrastive") if distributed else nullcontext():
        image_features = local("image_features", image_features)
        text_features = local("text_features", text_features)
        check_features(image_features, text_features)
        _check_options(direction, workspace_bytes, schedule, comm_dtype)
        scale = as_scalar("logit_scale", logit_scale, image_features, finite=not distributed)
        bias = None if logit_bias is None else as_scalar("logit_bias", logit_bias, image_features)
        backend = choose("contrastive", image_features, text_features)
        if distributed and backend == "reference":
            raise TypeError(
                f"image_features: the loss over a group needs a kernel; "
                f"{explain('contrastive', image_features, text_features)}"
            )
        features = unit_stride(image_features), unit_stride(text_features)
    if distributed and group is not None:
        loss = Distributed.apply(
            torch.ops.fastvlp.contrastive_distributed, 3, *features, scale, group.group_name,
            direction, schedule, comm_dtype, wants_gradients(*features, scale), workspace_bytes,
            global_value,
        )[0]  # fmt: skip
    elif backend == "reference" or not len(image_features):
        return without_autocast(contrastive_reference)(
            image_features, text_features, scale, bias, direction=direction
        )
    else:
        loss = softmax_loss(*features, scale, direction, workspace_bytes)
    return loss if bias is None else loss + 0.0 * bias


def _check_options(direction, workspace_bytes, schedule, comm_dtype):
    if direction not in DIRECTIONS:
        raise ValueError(f"direction: expected one of {DIRECTIONS}, got {direction!r}")
    check_workspace(workspace_bytes)
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule: expected one of {SCHEDULES}, got {schedule!r}")
    if comm_dtype not in COMM_DTYPES:
        raise ValueError(f"comm_dtype: expected one of {COMM_DTYPES}, got {comm_dtype!r}")


def contrastive_reference(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    logit_scale: torch.Tensor | float,
    logit_bias: torch.Tensor | float | None = None,
    *,
    direction: str = "both",
) -> torch.Tensor:
    """The definition of `contrastive`: any floating dtype, N^2 memory."""
    logits = logit_scale * image_features @ text_features.T
    if logit_bias is not None:
        logits = logits + logit_bias
    if logits.dtype != torch.float64:
        logits = logits.float()
    pairs = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    negatives, positive = logits.masked_fill(pairs, -torch.inf), logits.diagonal()
    sums = {
        "image_to_text": pair_losses(negatives.logsumexp(1), positive).sum(),
        "text_to_image": pair_losses(negatives.logsumexp(0), positive).sum(),
    }
    sums["both"] = (sums["image_to_text"] + sums["text_to_image"]) / 2
    return sums[direction] / max(len(logits), 1)


register_operators()
register_backends(
    "contrastive",
    example={"image_features": (2, 8), "text_features": (2, 8)},
    first=preferred_backend,
    **CANDIDATES,
)
