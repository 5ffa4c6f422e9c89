"""What itc_distributed.py compares: the contrastive loss over the ranks of the default group.

Each gives the loss and the gradients to both towers and to the logit scale.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from _harness.measure import DTYPES, OURS, Implementation, Missing

from baselines.contrastive import softmax
from baselines.contrastive.softmax import Loss, forward_backward

PEER = "open_clip"


def ours(schedule: str, comm_dtype: torch.dtype | None = None) -> Loss:
    from fastvlp.losses import ClipLoss

    return ClipLoss(**_across_ranks(), schedule=schedule, comm_dtype=comm_dtype)


def open_clip() -> Loss:
    # It gathers by a function that newer versions of torch deprecate, at every call.
    warnings.filterwarnings("ignore", category=FutureWarning, module="open_clip")
    return softmax.open_clip_loss().ClipLoss(**_across_ranks())


def _across_ranks() -> dict[str, Any]:
    return {
        "local_loss": True,
        "gather_with_grad": True,
        "rank": dist.get_rank(),
        "world_size": dist.get_world_size(),
    }


def open_clip_autocast(dtype: torch.dtype, device: str) -> Loss:
    loss = open_clip()

    def call(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, dtype):
            return loss(image, text, scale)

    return call


def implementations(
    dtype: str, world_size: int, device: str
) -> tuple[list[Implementation], list[Missing]]:
    """fastvlp by each of its schedules, and open_clip at each precision of its softmax."""

    def one(name: str, make_loss: Callable[[], Loss], **extra: str) -> Implementation:
        return Implementation(name, functools.partial(forward_backward, make_loss), extra=extra)

    found = [one(OURS, functools.partial(ours, "gather"), softmax="fp32")]
    if world_size > 1:
        found.append(one(f"{OURS} ring", functools.partial(ours, "ring"), softmax="fp32"))
        sent_as_bf16 = functools.partial(ours, "gather", torch.bfloat16)
        found.append(one(f"{OURS} bf16 sent", sent_as_bf16, softmax="fp32"))
    if not softmax.has_open_clip():
        return found, [Missing(PEER, "not installed", "pip install -e '.[bench]'")]
    if dtype == "fp32":
        return [*found, one(PEER, open_clip, softmax="fp32")], []
    autocast = functools.partial(open_clip_autocast, DTYPES[dtype], device)
    return [
        *found,
        one(f"{PEER} autocast", autocast, softmax="fp32"),
        one(f"{PEER} {dtype}", open_clip, softmax=dtype),
    ], []
