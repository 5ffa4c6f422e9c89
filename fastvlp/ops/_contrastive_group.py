"""The distributed losses as operators that torch.compile does not look into.

Before any exchange all ranks compare what they were given, so that a rank with bad input makes
every rank raise instead of leaving the others waiting.
"""

import math

import torch
import torch.distributed as dist

from ..distributed import Shards, agree, group_device, resolve
from ._contrastive_distributed import COMM_DTYPES, SCHEDULES, softmax_shares
from ._contrastive_ring import sigmoid_shares
from ._saved_gradients import ScaledGradients

DIRECTIONS = ("both", "image_to_text", "text_to_image")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def report_error(group, error: Exception) -> None:
    """Tells the other ranks why this one cannot take part; raises on every rank."""
    agree(group, 0, dict.fromkeys(_FACTS, 0), f"{error}", group_device(group))


_FACTS = ("width", "dtype", "loss", "direction", "schedule", "comm_dtype", "requires_grad",
          "workspace_bytes")  # fmt: skip


def _shards(x, scalars, group, *facts) -> Shards:
    error = ""
    for name, value in scalars.items():
        if not math.isfinite(value.item()):
            error = f"{name}: expected a finite value, got {value.item()}"
    values = (x.shape[1], _DTYPES.index(x.dtype), *facts)
    named = dict(zip(_FACTS, map(int, values), strict=True))
    return agree(group, len(x), named, error, x.device)


@torch.library.custom_op("fastvlp::contrastive_distributed", mutates_args=())
def contrastive_distributed(
    x: torch.Tensor,
    y: torch.Tensor,
    scale: torch.Tensor,
    group_name: str,
    direction: str,
    schedule: str,
    comm_dtype: torch.dtype | None,
    gradients: bool,
    workspace_bytes: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    group = resolve(group_name)
    shards = _shards(
        x, {"logit_scale": scale}, group, 0, DIRECTIONS.index(direction), SCHEDULES.index(schedule),
        COMM_DTYPES.index(comm_dtype), gradients, workspace_bytes,
    )  # fmt: skip
    rows, cols = direction != "text_to_image", direction != "image_to_text"
    return softmax_shares(
        x, y, scale, shards, rows, cols, schedule, comm_dtype, gradients, workspace_bytes
    )


@contrastive_distributed.register_fake
def _(x, y, scale, group_name, direction, schedule, comm_dtype, gradients, workspace_bytes):
    return scale.new_empty(()), *_fake_gradients(x, y, gradients), scale.new_empty(())


@torch.library.custom_op("fastvlp::sigmoid_contrastive_distributed", mutates_args=())
def sigmoid_contrastive_distributed(
    x: torch.Tensor,
    y: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    group_name: str,
    comm_dtype: torch.dtype | None,
    gradients: bool,
    workspace_bytes: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    group = resolve(group_name)
    shards = _shards(
        x, {"logit_scale": scale, "logit_bias": bias}, group, 1, 0, 0,
        COMM_DTYPES.index(comm_dtype), gradients, workspace_bytes,
    )  # fmt: skip
    return sigmoid_shares(x, y, scale, bias, shards, comm_dtype, gradients, workspace_bytes)


@sigmoid_contrastive_distributed.register_fake
def _(x, y, scale, bias, group_name, comm_dtype, gradients, workspace_bytes):
    loss, dscale, dbias = (scale.new_empty(()) for _ in range(3))
    return loss, *_fake_gradients(x, y, gradients), dscale, dbias


def _fake_gradients(x, y, gradients):
    return tuple(t.new_empty((t.shape[0] if gradients else 0, t.shape[1])) for t in (x, y))


@torch.library.custom_op("fastvlp::mean_over_ranks", mutates_args=())
def mean_over_ranks(value: torch.Tensor, group_name: str) -> torch.Tensor:
    group = resolve(group_name)
    total = value.clone()
    dist.all_reduce(total, group=group)
    return total / group.size()


@mean_over_ranks.register_fake
def _(value, group_name):
    return torch.empty_like(value)


class WithMeanValue(torch.autograd.Function):
    """Shows the mean over ranks and passes the gradient to this rank's own value unchanged."""

    @staticmethod
    def forward(ctx, value, group_name):
        return torch.ops.fastvlp.mean_over_ranks(value, group_name)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Distributed(torch.autograd.Function):
    """apply(operator, inputs..., options): an operator that returns (loss, *gradients)."""

    @staticmethod
    def forward(ctx, operator, count, *inputs_and_options):
        inputs, options = inputs_and_options[:count], inputs_and_options[count:]
        gradients = any(ctx.needs_input_grad[2 : 2 + count])
        loss, *computed = operator(*inputs, *options[:-1], gradients, options[-1])
        ctx.count, ctx.others = count, len(options)
        ctx.save_for_backward(*inputs, *computed)
        return loss

    @staticmethod
    def backward(ctx, grad):
        gradients = ScaledGradients.apply(grad, *ctx.saved_tensors)
        return None, None, *gradients, *[None] * ctx.others
