"""The operators as modules, in the shape trainers use today.

`ClipLoss` and `SigLipLoss` take the constructor arguments and calls of open_clip's losses of the
same names, so that replacing the import is enough:

    from fastvlp.losses import ClipLoss  # instead of: from open_clip.loss import ClipLoss

Values are open_clip's, and so are gradients, with one exception. Over W ranks with open_clip's
defaults, `local_loss=False, gather_with_grad=False`, its gradient with respect to features lacks
what other ranks' losses say about them, and after DDP's averaging is 1/W of the gradient of the
global batch. Here it is always that gradient, W times open_clip's: what open_clip gives with
`gather_with_grad=True`. An optimiser such as Adam is blind to the factor; clipping by norm and SGD
are not.

Arguments that only make sense for another way of computing the loss are accepted where ignoring
them is exact; anything else raises.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from . import ops
from .distributed import Shards, gather_rows, reporting, spans_ranks, validate_across_ranks
from .ops.autocast import as_autocast
from .ops.checks import as_scalar, check_count, check_features


class _ContrastiveLoss(nn.Module):
    """What both losses have: their ranks, and methods that forward does not go through."""

    # Of a subclass's own version forward would know nothing.
    _unused_by_forward: tuple[str, ...] = ()

    def __init__(self, rank: int, world_size: int, group: dist.ProcessGroup | None):
        super().__init__()
        if group is None and world_size <= 1 and rank != 0:
            raise ValueError(f"rank: expected 0 with world_size {world_size}, got {rank}")
        self.rank, self.world_size = rank, world_size
        self.group = group
        self._default_group = group is None and world_size > 1
        if self._default_group and dist.is_initialized():
            self._resolve_group()
        self._check_overrides()

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The process group to compute over; None for a single process.

        Without one at construction, and with `world_size` above 1, it is torch.distributed's
        default group from the first call on. Assigning one replaces it.
        """
        if self._default_group:
            world = dist.group.WORLD if dist.is_initialized() else None
            with reporting(world, type(self).__name__):
                self._resolve_group()
        return self._group

    @group.setter
    def group(self, group: dist.ProcessGroup | None) -> None:
        self._group = group if spans_ranks(group) else None
        self._default_group = False

    def _resolve_group(self) -> None:
        group = dist.group.WORLD if dist.is_initialized() else None
        if group is None:
            raise ValueError(
                f"world_size: got {self.world_size}, but torch.distributed is not initialised; "
                "call torch.distributed.init_process_group before the loss"
            )
        if (self.rank, self.world_size) != (group.rank(), group.size()):
            raise ValueError(
                f"rank, world_size: expected {group.rank()}, {group.size()} as torch.distributed "
                f"has them, got {self.rank}, {self.world_size}"
            )
        self._group, self._default_group = group, False

    def _check_overrides(self) -> None:
        classes: Iterable[type[nn.Module]] = type(self).__mro__
        base = next(c for c in classes if "_unused_by_forward" in vars(c))
        if type(self).forward is not base.forward:
            return
        for name in self._unused_by_forward:
            if getattr(type(self), name) is not getattr(base, name):
                raise TypeError(
                    f"{type(self).__name__}.{name}: forward of {base.__name__} computes the loss "
                    f"without it; define forward, too, or derive from open_clip's {base.__name__}"
                )


class ClipLoss(_ContrastiveLoss):
    """Symmetric contrastive loss of CLIP; see `fastvlp.ops.contrastive`.

    Args:
        local_loss: over several ranks, whether the returned value is this rank's share of the
            loss (True) or the loss of the global batch (False). Gradients are the same.
        gather_with_grad: over several ranks, whether features of other ranks receive gradients.
            They always do here, at no extra exchange. With local_loss=False the gradient with
            respect to features is then W times what open_clip gives without it; local_loss=True
            with gather_with_grad=False, whose gradient in open_clip points elsewhere, raises.
        cache_labels: accepted and without effect, because no label tensor exists.
        rank, world_size: those of torch.distributed's default group, which has to exist at the
            first call.
        use_horovod: must be False.
        workspace_bytes, group, schedule, comm_dtype: see `fastvlp.ops.contrastive`. Without
            `group` and with world_size above 1, the default group.

    Subclasses that compute something of the logits besides, as open_clip's DistillClipLoss does,
    have its `get_logits` and `get_ground_truth`. `forward` does not go through them.

    Examples:
        >>> import torch
        >>> from torch.nn.functional import normalize
        >>> images, texts = (normalize(torch.randn(8, 16), dim=-1).requires_grad_() for _ in "ab")
        >>> from fastvlp.losses import ClipLoss
        >>> loss = ClipLoss()(images, texts, torch.tensor(14.3))
        >>> loss.backward()
        >>> images.grad.shape
        torch.Size([8, 16])
    """

    _unused_by_forward = ("get_logits", "get_ground_truth")

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        workspace_bytes: int | None = None,
        group: dist.ProcessGroup | None = None,
        schedule: str = "auto",
        comm_dtype: torch.dtype | None = None,
    ):
        super().__init__(rank, world_size, group)
        over_ranks = self._default_group or self._group is not None
        if over_ranks and local_loss and not gather_with_grad:
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

        Inside torch.autocast the features are cast to its dtype first, as the matmuls of the
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

    def get_logits(
        self,
        image_features: torch.Tensor,
        text_features: torch.Tensor,
        logit_scale: torch.Tensor | float,
        logit_bias: torch.Tensor | float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(logits_per_image, logits_per_text), each [N, N] and whole in memory.

        Over ranks N is the global batch; with `local_loss` the rows are this rank's own, and all
        ranks must have equally many. Gradients return to the features' owners, added over ranks,
        as in open_clip with `gather_with_grad`.
        """
        if self.group is None:
            per_image = logit_scale * image_features @ text_features.T
            per_text = per_image.T
        else:
            shards = self._agree(self.group, image_features, text_features, logit_scale)
            all_images, all_texts = (
                gather_rows(t, shards) for t in (image_features, text_features)
            )
            if self.local_loss:
                per_image = logit_scale * image_features @ all_texts.T
                per_text = logit_scale * text_features @ all_images.T
            else:
                per_image = logit_scale * all_images @ all_texts.T
                per_text = per_image.T
        if logit_bias is None:
            return per_image, per_text
        return per_image + logit_bias, per_text + logit_bias

    def get_ground_truth(self, device: torch.device | str, num_logits: int) -> torch.Tensor:
        """int64 [num_logits], the column of each row's positive in what `get_logits` returns."""
        labels = torch.arange(num_logits, device=device)
        if self.group is not None and self.local_loss:
            labels = labels + num_logits * self.group.rank()
        return labels

    def _agree(
        self, group: dist.ProcessGroup, image_features, text_features, logit_scale
    ) -> Shards:
        with reporting(group, "get_logits"):
            check_features(image_features, text_features)
            scale = as_scalar("logit_scale", logit_scale, image_features, finite=False)
        facts = {"width": image_features.shape[1], "local_loss": self.local_loss}
        values, rows = {"logit_scale": scale}, len(image_features)
        shards = validate_across_ranks(group, "get_logits", rows=rows, facts=facts, values=values)
        if self.local_loss and len(set(shards.sizes)) > 1:
            raise ValueError(
                "image_features: expected equally many on every rank for the logits of "
                f"local_loss=True, got {list(shards.sizes)} by rank"
            )
        return shards


class SigLipLoss(_ContrastiveLoss):
    """Pairwise sigmoid loss of SigLIP; see `fastvlp.ops.sigmoid_contrastive`.

    Args:
        cache_labels: accepted and without effect, because no label tensor exists.
        rank, world_size: as in `ClipLoss`.
        dist_impl: how open_clip sends features between ranks: "bidir", "shift", "reduce",
            "gather" or None. All give the same loss; here they are passed round a ring.
        chunk_size: rows of logits at a time in open_clip, 0 for all. Without effect on `forward`,
            whose memory `workspace_bytes` bounds; `_loss` of negatives computes so many at a time.
        workspace_bytes, group, comm_dtype: see `fastvlp.ops.contrastive`. Without `group` and
            with world_size above 1, the default group.

    Subclasses have open_clip's `get_logits`, `get_ground_truth` and `_loss`, all of one rank's
    own features. `forward` does not go through them.

    Examples:
        >>> import torch
        >>> from torch.nn.functional import normalize
        >>> images, texts = (normalize(torch.randn(8, 16), dim=-1).requires_grad_() for _ in "ab")
        >>> from fastvlp.losses import SigLipLoss
        >>> loss = SigLipLoss()(images, texts, torch.tensor(10.0), torch.tensor(-10.0))
        >>> loss.backward()
        >>> images.grad.shape
        torch.Size([8, 16])
    """

    _unused_by_forward = ("get_logits", "get_ground_truth", "_loss")

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
        *,
        workspace_bytes: int | None = None,
        group: dist.ProcessGroup | None = None,
        comm_dtype: torch.dtype | None = None,
    ):
        super().__init__(rank, world_size, group)
        if dist_impl not in (None, "bidir", "shift", "reduce", "gather"):
            raise ValueError(
                "dist_impl: expected 'bidir', 'shift', 'reduce', 'gather' or None, got "
                f"{dist_impl!r}"
            )
        check_count("chunk_size", chunk_size)
        self.cache_labels = cache_labels
        self.chunk_size = chunk_size
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

    def get_logits(
        self,
        image_features: torch.Tensor,
        text_features: torch.Tensor,
        logit_scale: torch.Tensor | float,
        logit_bias: torch.Tensor | float | None = None,
    ) -> torch.Tensor:
        """[N, M] logits of these features, whole in memory."""
        logits = logit_scale * image_features @ text_features.T
        return logits if logit_bias is None else logits + logit_bias

    def get_ground_truth(
        self,
        device: torch.device | str,
        dtype: torch.dtype,
        num_logits: int,
        negative_only: bool = False,
    ) -> torch.Tensor:
        """[num_logits, num_logits]: 1 for positives, on the diagonal, and -1 for negatives."""
        positives = torch.eye(num_logits, device=device, dtype=dtype)
        return -torch.ones_like(positives) if negative_only else 2 * positives - 1

    def _loss(
        self,
        image_features: torch.Tensor,
        text_features: torch.Tensor,
        logit_scale: torch.Tensor | float,
        logit_bias: torch.Tensor | float | None = None,
        negative_only: bool = False,
    ) -> torch.Tensor:
        """The loss of these features alone; `negative_only`: of M texts that match no image."""
        if not negative_only:
            image_features, text_features = as_autocast(image_features, text_features)
            return ops.sigmoid_contrastive(
                image_features,
                text_features,
                logit_scale,
                0.0 if logit_bias is None else logit_bias,
                workspace_bytes=self.workspace_bytes,
            )
        total = torch.zeros((), device=image_features.device)
        for rows in image_features.split(self.chunk_size or max(1, len(image_features))):
            logits = self.get_logits(rows, text_features, logit_scale, logit_bias)
            logits = logits if logits.dtype == torch.float64 else logits.float()
            total = total - F.logsigmoid(-logits).sum()
        return total / max(len(image_features), 1)
