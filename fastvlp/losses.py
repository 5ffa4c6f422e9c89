"""The operators as modules, in the shape trainers use today.

`ClipLoss` and `SigLipLoss` take the constructor arguments and calls of open_clip's losses of the
same names and give the same value and gradients, so that replacing the import is enough:

    from fastvlp.losses import ClipLoss  # instead of: from open_clip.loss import ClipLoss

Arguments that only make sense for another way of computing the loss are accepted where ignoring
them is exact; anything else raises.
"""

import torch
import torch.distributed as dist
from torch import nn

from . import ops
from .ops._contrastive_plan import DEFAULT_WORKSPACE_BYTES
from .ops.autocast import as_autocast


class ClipLoss(nn.Module):
    """Symmetric contrastive loss of CLIP; see `fastvlp.ops.contrastive`.

    Args:
        local_loss: over several ranks, whether the returned value is this rank's share of the
            loss (True) or the loss of the global batch (False). Gradients are the same.
        gather_with_grad: over several ranks, whether features of other ranks receive gradients.
            They always do here, at no extra exchange; local_loss=True with
            gather_with_grad=False, whose gradient lacks those terms in open_clip, raises.
        cache_labels: accepted and without effect, because no label tensor exists.
        rank, world_size: those of the group, which torch.distributed has to know already.
        use_horovod: must be False.
        workspace_bytes, group, schedule, comm_dtype: see `fastvlp.ops.contrastive`. Without
            `group` and with world_size above 1, the default group.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
        group: dist.ProcessGroup | None = None,
        schedule: str = "auto",
        comm_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.group = _group(rank, world_size, group)
        if self.group is not None and local_loss and not gather_with_grad:
            raise ValueError(
                "gather_with_grad: local_loss=True needs gather_with_grad=True; without it the "
                "gradient lacks what other ranks' losses say about this rank's features, and "
                "training goes wrong silently"
            )
        if use_horovod:
            raise ValueError("use_horovod: only torch.distributed is supported; pass False")
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod
        self.workspace_bytes = workspace_bytes
        self.schedule = schedule
        self.comm_dtype = comm_dtype

    def forward(
        self,
        image_features: torch.Tensor,
        text_features: torch.Tensor,
        logit_scale: torch.Tensor | float,
        logit_bias: torch.Tensor | float | None = None,
        output_dict: bool = False,
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """Loss of [N, D] features; `{"contrastive_loss": loss}` with `output_dict`.

        Inside torch.autocast the features are cast to its dtype first, as the products of the
        plain formulation would be; softmax and sums stay float32.
        """
        image_features, text_features = as_autocast(image_features, text_features)
        loss = ops.contrastive(
            image_features,
            text_features,
            logit_scale,
            logit_bias,
            workspace_bytes=self.workspace_bytes,
            group=self.group,
            schedule=self.schedule,
            comm_dtype=self.comm_dtype,
            global_value=not self.local_loss,
        )
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(nn.Module):
    """Pairwise sigmoid loss of SigLIP; see `fastvlp.ops.sigmoid_contrastive`.

    Args:
        cache_labels: accepted and without effect, because no label tensor exists.
        rank, world_size: those of the group, which torch.distributed has to know already.
        dist_impl: how features travel between ranks in open_clip: "bidir", "shift", "reduce",
            "gather" or None. All give the same loss; here they travel round a ring.
        workspace_bytes, group, comm_dtype: see `fastvlp.ops.contrastive`. Without `group` and
            with world_size above 1, the default group.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        *,
        workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
        group: dist.ProcessGroup | None = None,
        comm_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.group = _group(rank, world_size, group)
        if dist_impl not in (None, "bidir", "shift", "reduce", "gather"):
            raise ValueError(
                "dist_impl: expected 'bidir', 'shift', 'reduce', 'gather' or None, got "
                f"{dist_impl!r}"
            )
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl or "bidir"
        self.workspace_bytes = workspace_bytes
        self.comm_dtype = comm_dtype

    def forward(
        self,
        image_features: torch.Tensor,
        text_features: torch.Tensor,
        logit_scale: torch.Tensor | float,
        logit_bias: torch.Tensor | float | None = None,
        output_dict: bool = False,
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """Loss of [N, D] features; `{"contrastive_loss": loss}` with `output_dict`.

        Autocast is treated as in `ClipLoss`.
        """
        image_features, text_features = as_autocast(image_features, text_features)
        loss = ops.sigmoid_contrastive(
            image_features,
            text_features,
            logit_scale,
            0.0 if logit_bias is None else logit_bias,
            workspace_bytes=self.workspace_bytes,
            group=self.group,
            comm_dtype=self.comm_dtype,
        )
        return {"contrastive_loss": loss} if output_dict else loss


def _group(rank: int, world_size: int, group: dist.ProcessGroup | None):
    """The group to compute over, None for a single process; checks rank and world_size."""
    if group is None and world_size == 1:
        if rank != 0:
            raise ValueError(f"rank: expected 0 with world_size 1, got {rank}")
        return None
    if group is None:
        if not dist.is_initialized():
            raise ValueError(
                f"world_size: got {world_size}, but torch.distributed is not initialised; call "
                "torch.distributed.init_process_group first"
            )
        group = dist.group.WORLD
        if (rank, world_size) != (group.rank(), group.size()):
            raise ValueError(
                f"rank, world_size: expected {group.rank()}, {group.size()} as torch.distributed "
                f"has them, got {rank}, {world_size}"
            )
    return group if group.size() > 1 else None
