"""The operators as modules, in the shape trainers use today.

`ClipLoss` and `SigLipLoss` take the constructor arguments and calls of open_clip's losses of the
same names and give the same value and gradients, so that replacing the import is enough:

    from fastvlp.losses import ClipLoss  # instead of: from open_clip.loss import ClipLoss

Arguments that only make sense for another way of computing the loss are accepted where ignoring
them is exact; anything else raises.
"""

import torch
from torch import nn

from . import ops
from .ops._contrastive_plan import DEFAULT_WORKSPACE_BYTES


class ClipLoss(nn.Module):
    """Symmetric contrastive loss of CLIP; see `fastvlp.ops.contrastive`.

    Args:
        local_loss, gather_with_grad: how features are gathered over ranks. With one process every
            combination is the same loss.
        cache_labels: accepted and without effect, because no label tensor exists.
        rank, world_size: 0 and 1; several ranks are not supported yet.
        use_horovod: must be False.
        workspace_bytes: bound on the extra memory; see `fastvlp.ops.contrastive`.
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
    ):
        super().__init__()
        _check_single_process(rank, world_size)
        if use_horovod:
            raise ValueError("use_horovod: only torch.distributed is supported; pass False")
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod
        self.workspace_bytes = workspace_bytes

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
        image_features, text_features = _autocast(image_features, text_features)
        loss = ops.contrastive(
            image_features,
            text_features,
            logit_scale,
            logit_bias,
            workspace_bytes=self.workspace_bytes,
        )
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(nn.Module):
    """Pairwise sigmoid loss of SigLIP; see `fastvlp.ops.sigmoid_contrastive`.

    Args:
        cache_labels: accepted and without effect, because no label tensor exists.
        rank, world_size: 0 and 1; several ranks are not supported yet.
        dist_impl: how features travel between ranks: "bidir", "shift", "reduce", "gather" or
            None. With one process all are the same loss.
        workspace_bytes: bound on the extra memory.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        *,
        workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    ):
        super().__init__()
        _check_single_process(rank, world_size)
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
        image_features, text_features = _autocast(image_features, text_features)
        loss = ops.sigmoid_contrastive(
            image_features,
            text_features,
            logit_scale,
            0.0 if logit_bias is None else logit_bias,
            workspace_bytes=self.workspace_bytes,
        )
        return {"contrastive_loss": loss} if output_dict else loss


def _check_single_process(rank: int, world_size: int) -> None:
    if world_size != 1:
        raise NotImplementedError(
            f"world_size: got {world_size}; the loss over several ranks is not part of this "
            "version. Compute the loss on gathered features with world_size=1, or wait for the "
            "distributed release"
        )
    if rank != 0:
        raise ValueError(f"rank: expected 0 with world_size 1, got {rank}")


def _autocast(*features: torch.Tensor) -> tuple[torch.Tensor, ...]:
    device = features[0].device.type
    if not torch.is_autocast_enabled(device):
        return features
    return tuple(f.to(torch.get_autocast_dtype(device)) for f in features)
