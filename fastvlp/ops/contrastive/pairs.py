"""What the softmax loss makes of its statistics: losses of pairs, and what gradients start from.

With L the log-sum-exp over a row's or column's negatives and z the logit of its positive p,

    -log p = log(1 + exp(L - z)),    1 - p = 1 / (1 + exp(z - L)).

Neither is a difference of two numbers near each other, as lse - z and p - 1 are once the pairs are
well fitted: what is left of the error is the rounding of the logits. Operators give L as float64
and z as float32, because its own rounding would scale the softmax of a whole row.
"""

import torch
import torch.nn.functional as F


def pair_losses(negatives: torch.Tensor, positive: torch.Tensor) -> torch.Tensor:
    """-log p of each pair from `negatives`, L, and `positive`, z, both [N]; dtype of z."""
    # Above 40 the loss is the difference itself at any dtype. An infinite z is no loss of 0: NaN.
    losses = F.softplus(negatives - positive, threshold=40.0)
    return losses.to(positive.dtype) + 0.0 * positive


def log_sum_exp(negatives: torch.Tensor, positive: torch.Tensor) -> torch.Tensor:
    """Over all logits of a row or column; [0], a direction without a loss, stays as it is."""
    if not negatives.numel():
        return negatives
    return torch.logaddexp(negatives, positive.to(negatives.dtype))


def positive_gradient(
    row_negatives: torch.Tensor,
    col_negatives: torch.Tensor,
    positive: torch.Tensor,
    weight: torch.Tensor | float,
) -> torch.Tensor:
    """The gradient with respect to the positives' logits, [N]: -weight (1 - p) of each direction.

    A direction without a loss has [0] log-sum-exps.
    """
    missing = torch.zeros_like(positive)
    for negatives in (row_negatives, col_negatives):
        if negatives.numel():
            missing += torch.sigmoid(negatives - positive).to(missing.dtype)
    return -weight * missing
