"""The distributed losses as operators that torch.compile does not look into.

Before any exchange all ranks compare what they were given, so that a rank with bad input makes
every rank raise instead of leaving the others waiting.
"""

import torch
import torch.distributed as dist

from ..._autograd import Function
from ...distributed import Shards, group_device, resolve, validate_across_ranks
from .._core.implement import without_autocast
from .._core.saved_gradients import scaled_gradients
from .gather import COMM_DTYPES, SCHEDULES, softmax_shares
from .ring import sigmoid_shares

DIRECTIONS = ("both", "image_to_text", "text_to_image")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _shards(call, x, values, group, comm_dtype, gradients, workspace_bytes, **options) -> Shards:
    facts = {
        "width": x.shape[1],
        "dtype": _DTYPES.index(x.dtype),
        "device": x.is_cuda,
        "comm_dtype": COMM_DTYPES.index(comm_dtype),
        "requires_grad": gradients,
        "workspace_bytes": workspace_bytes or 0,  # None: the default of every rank's device
        **options,
    }
    device = x.device if x.device.type == group_device(group).type else None
    return validate_across_ranks(
        group, call, rows=len(x), facts=facts, values=values, device=device
    )


@torch.library.custom_op("fastvlp::contrastive_distributed", mutates_args=())
@without_autocast
def contrastive_distributed(
    x: torch.Tensor,
    y: torch.Tensor,
    scale: torch.Tensor,
    group_name: str,
    direction: str,
    schedule: str,
    comm_dtype: torch.dtype | None,
    gradients: bool,
    workspace_bytes: int | None,
    global_value: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    group = resolve(group_name)
    shards = _shards(
        "contrastive", x, {"logit_scale": scale}, group, comm_dtype, gradients, workspace_bytes,
        direction=DIRECTIONS.index(direction), schedule=SCHEDULES.index(schedule),
        global_value=global_value,
    )  # fmt: skip
    if not shards.total:
        return scale.new_zeros(()), *_gradients_like(x, y, gradients), scale.new_zeros(())
    rows, cols = direction != "text_to_image", direction != "image_to_text"
    loss, *computed = softmax_shares(
        x, y, scale, shards, rows, cols, schedule, comm_dtype, gradients, workspace_bytes
    )
    if global_value:
        dist.all_reduce(loss, group=group)
        loss = loss / shards.world_size
    return loss, *computed


@contrastive_distributed.register_fake
def _(x, y, scale, group_name, direction, schedule, comm_dtype, gradients, *_):
    return scale.new_empty(()), *_gradients_like(x, y, gradients), scale.new_empty(())


@torch.library.custom_op("fastvlp::sigmoid_contrastive_distributed", mutates_args=())
@without_autocast
def sigmoid_contrastive_distributed(
    x: torch.Tensor,
    y: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    group_name: str,
    comm_dtype: torch.dtype | None,
    gradients: bool,
    workspace_bytes: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    group = resolve(group_name)
    values = {"logit_scale": scale, "logit_bias": bias}
    shards = _shards(
        "sigmoid_contrastive", x, values, group, comm_dtype, gradients, workspace_bytes
    )
    if not shards.total:
        loss, dscale, dbias = (scale.new_zeros(()) for _ in range(3))
        return loss, *_gradients_like(x, y, gradients), dscale, dbias
    return sigmoid_shares(x, y, scale, bias, shards, comm_dtype, gradients, workspace_bytes)


@sigmoid_contrastive_distributed.register_fake
def _(x, y, scale, bias, group_name, comm_dtype, gradients, workspace_bytes):
    loss, dscale, dbias = (scale.new_empty(()) for _ in range(3))
    return loss, *_gradients_like(x, y, gradients), dscale, dbias


def _gradients_like(x, y, gradients):
    return tuple(t.new_empty((t.shape[0] if gradients else 0, t.shape[1])) for t in (x, y))


class Distributed(Function):
    """apply(operator, count, *inputs, *options): an operator that returns (loss, *gradients).

    `count` inputs are differentiable. The loss is the first output; the others are for backward.
    """

    @staticmethod
    def forward(operator, count, *inputs_and_options):
        return operator(*inputs_and_options)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        _, count, *inputs = inputs
        _, *gradients = outputs
        ctx.mark_non_differentiable(*gradients)
        ctx.set_materialize_grads(False)  # of the other outputs: zeros as large as they are
        ctx.save_for_backward(*inputs[:count], *gradients)
        ctx.arguments = len(inputs) + 2
        ctx.options = len(inputs) - count

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * ctx.arguments
        gradients = scaled_gradients(grad, *ctx.saved_tensors)
        return None, None, *gradients, *[None] * ctx.options
