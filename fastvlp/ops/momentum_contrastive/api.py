"""ALBEF's loss against momentum keys and a queue, with distillation and hard negatives."""

from typing import NamedTuple

import torch

from ..._autograd import Function
from .._core.backends import native_on_cpu
from .._core.dispatch import choose, register_backends
from .._core.implement import without_autocast
from .._core.philox import gumbel, philox
from .._core.saved_gradients import scaled_gradients, wants_gradients
from .checks import CANDIDATES, prepare
from .register import register_operators, run


class MomentumContrastive(NamedTuple):
    """The loss and, for every row of the batch, the column of its hard negative (int64 [B]).

    -1 where a row has no admissible negative: a batch of one, or of equal ids, or logits that are
    NaN. None where no negatives were asked for.
    """

    loss: torch.Tensor
    negative_texts: torch.Tensor | None  # of the images
    negative_images: torch.Tensor | None  # of the texts


def momentum_contrastive(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    image_momentum: torch.Tensor,
    text_momentum: torch.Tensor,
    image_queue: torch.Tensor,
    text_queue: torch.Tensor,
    temperature: torch.Tensor | float,
    alpha: torch.Tensor | float = 0.4,
    *,
    ids: torch.Tensor | None = None,
    queue_ids: torch.Tensor | None = None,
    queue_length: torch.Tensor | int | None = None,
    hard_negatives: bool = True,
    seed: torch.Tensor | int | None = None,
) -> MomentumContrastive:
    """Contrastive loss of student features against momentum keys, and hard negatives.

    For image -> text, with f the student's image rows, f' the teacher's, and keys K = [the
    teacher's text rows of this batch ; the valid rows of the text queue]:

        s_ij = <f_i, K_j> / t,   s'_ij = <f'_i, K_j> / t
        y_i  = alpha softmax(s'_i) + (1 - alpha) P_i
        loss = mean_i [lse_j s_ij - sum_j y_ij s_ij]

    P_i is one-hot at the row's own pair or, with ids, uniform over all keys of the same id. Text ->
    image is the same with the modalities exchanged; the loss is the mean of the two directions.

    In the same pass each row samples its hard negative: column j of the batch, its own pair and
    equal ids excluded, with the probability softmax_j(s_ij), as the largest s_ij + Gumbel noise.

    Source: Li et al., "Align before Fuse", arXiv 2107.07651, sections 3.2 and 3.4 (equations 1, 2
    and 6); the queue after He et al., MoCo, arXiv 1911.05722, section 3.2; uniform targets over
    equal ids as in ALBEF's retrieval fine-tuning; the sampling after Gumbel, see Maddison et al.,
    "A* Sampling", arXiv 1411.0030, section 2.

    Cost: 4 B (B + Q) D FLOP a direction forward, twice that with gradients, which come out of the
    same pass; without a teacher (alpha = 0) half of it. The keys are read once. Memory beyond the
    gradients: tiles and row sums that stay in a core's cache, a few MB; nothing of size B x Q
    exists.

    GEMMs of float32 features are float32; those of bfloat16 use bfloat16 multiplications with
    float32 sums where the CPU has them, else float32; softmax and sums are always float32.

    Args:
        image_features, text_features: [B, D], the student's, normalised by the caller; float32,
            bfloat16 or float16 (float64 through the reference). The loss of no pairs is 0, with
            zero gradients.
        image_momentum, text_momentum: [B, D], the teacher's, without gradient, same dtype.
        image_queue, text_queue: [Q, D], the teacher's features of earlier batches (row k of both
            from one pair), same dtype; Q may be 0. `fastvlp.FeatureQueue` keeps one.
        temperature: t > 0, which divides the logits: a number or a tensor of one element; for
            float32 logits 1e-36 to 1e36.
        alpha: weight of the teacher's softmax in the targets, 0 to 1: a number or a tensor of one
            element. At 0 the teacher's features serve as keys only, at 1 ids have no effect on the
            loss.
        ids: int64 [B]; pairs of equal id are positives of one another.
        queue_ids: int64 [Q], the ids of the queue's rows; needed with `ids`. Give rows without an
            id a number that no pair has.
        queue_length: how many rows, from the first one on, are valid: a number or an int64 tensor
            of one element; None: all. The others are not read.
        hard_negatives: whether to sample them.
        seed: of the sampling, a number or an int64 tensor of one element; None takes it from
            torch's generator of the features' device. Equal seeds sample equally on every device.

    Returns:
        MomentumContrastive: the loss, a zero-dimensional float32 tensor (float64 for float64
        features), differentiable once with respect to the student's features and the temperature,
        and the hard negatives. Nothing here waits for a GPU.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
        RuntimeError: FASTVLP_BACKEND forces an implementation that cannot run, or a second
            derivative is asked for.

    Examples:
        >>> import torch
        >>> from torch.nn.functional import normalize
        >>> from fastvlp.ops import momentum_contrastive
        >>> image, text, image_m, text_m = (normalize(torch.randn(4, 16), dim=-1) for _ in range(4))
        >>> queues = [normalize(torch.randn(64, 16), dim=-1) for _ in range(2)]
        >>> image = image.requires_grad_()
        >>> found = momentum_contrastive(image, text, image_m, text_m, *queues, temperature=0.07)
        >>> found.loss.backward()
        >>> found.negative_texts.shape, image.grad.shape
        (torch.Size([4]), torch.Size([4, 16]))
    """
    inputs = prepare(
        image_features, text_features, image_momentum, text_momentum, image_queue, text_queue,
        temperature, alpha, ids, queue_ids, queue_length, seed,
    )  # fmt: skip
    backend = choose("momentum_contrastive", image_features, text_features)
    if backend == "reference" or not len(image_features):
        return without_autocast(momentum_contrastive_reference)(
            *inputs.tensors(), hard_negatives=hard_negatives
        )
    tensors = inputs.tensors()
    gradients = wants_gradients(*tensors[:2], tensors[6])
    loss, *negatives = _Momentum.apply(inputs.teacher, hard_negatives, gradients, *tensors)[:3]
    return MomentumContrastive(loss, *(negatives if hard_negatives else (None, None)))


def momentum_contrastive_reference(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    image_momentum: torch.Tensor,
    text_momentum: torch.Tensor,
    image_queue: torch.Tensor,
    text_queue: torch.Tensor,
    temperature: torch.Tensor | float,
    alpha: torch.Tensor | float,
    ids: torch.Tensor | None,
    queue_ids: torch.Tensor | None,
    queue_length: torch.Tensor | int,
    seed: torch.Tensor | int,
    *,
    hard_negatives: bool = True,
) -> MomentumContrastive:
    """The definition of `momentum_contrastive`: any floating dtype, several B x (B + Q)."""
    batch, total = len(image_features), len(image_features) + len(image_queue)
    column = torch.arange(total, device=image_features.device)
    row = column[:batch, None]
    valid = column < batch + queue_length
    positive = column == row
    if ids is not None and queue_ids is not None:
        positive = positive | ((ids[:, None] == torch.cat([ids, queue_ids])) & valid)

    def direction(student, teacher, keys, queue, stream):
        keys = torch.cat([keys, queue]).detach()
        keys = torch.where(valid[:, None], keys, 0)
        low = torch.float64 if student.dtype == torch.float64 else torch.float32
        logits = (student @ keys.T).to(low) / temperature
        with torch.no_grad():
            taught = ((teacher @ keys.T).to(low) / temperature).masked_fill(~valid, -torch.inf)
            target = (1 - alpha) * positive / positive.sum(1, keepdim=True)
            # Not 0 * NaN: at alpha 0 the teacher has no say, whatever it says.
            target = target + torch.where(torch.as_tensor(alpha != 0), alpha * taught.softmax(1), 0)
            target = target.masked_fill(column == row, 0)
        # Relative to the own pair's logit, whose target is 1 less the others': of a row that is
        # fitted well, lse - own and p - 1 would keep nothing but rounding. Not filled with
        # -infinity, since there may be nothing else in the row.
        own = logits.diagonal()[:, None]
        others = logits.masked_fill(~valid | (column == row), torch.finfo(low).min)
        excess = torch.logaddexp(others.logsumexp(1) - own[:, 0], logits.new_zeros(()))
        loss = excess - (target * (logits - own)).sum(1)
        loss = loss.sum() / max(batch, 1)
        if not hard_negatives or not batch:
            return loss, column[:0] if hard_negatives else None
        columns, rows = torch.broadcast_tensors(column[:batch], row)
        words = philox(seed, [columns, rows, torch.full_like(rows, stream), 0 * rows])[0]
        score = logits.detach()[:, :batch] + gumbel(words, low)
        score = score.masked_fill(positive[:, :batch] | score.isnan(), -torch.inf)
        best, negative = score.max(1)
        return loss, torch.where(best == -torch.inf, -1, negative)

    forth, texts = direction(image_features, image_momentum, text_momentum, text_queue, 0)
    back, images = direction(text_features, text_momentum, image_momentum, image_queue, 1)
    return MomentumContrastive((forth + back) / 2, texts, images)


class _Momentum(Function):
    """The loss, the hard negatives of both directions, and the gradients for backward."""

    @staticmethod
    def forward(teacher, negatives, gradients, *tensors):
        loss, d_image, d_text, d_temperature, texts, images = run(
            tensors, teacher, gradients, negatives
        )
        return loss, texts, images, d_image, d_text, d_temperature

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        image, text, temperature = inputs[3], inputs[4], inputs[9]
        _, *others = outputs
        ctx.mark_non_differentiable(*others)
        ctx.set_materialize_grads(False)  # of the other outputs: zeros as large as they are
        ctx.save_for_backward(image, text, temperature, *others[2:])

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 15
        d_image, d_text, d_temperature = scaled_gradients(grad, *ctx.saved_tensors)
        return None, None, None, d_image, d_text, *(None,) * 4, d_temperature, *(None,) * 5


register_operators()
register_backends(
    "momentum_contrastive",
    example={"image_features": (2, 8), "text_features": (2, 8)},
    first=native_on_cpu,
    **CANDIDATES,
)
