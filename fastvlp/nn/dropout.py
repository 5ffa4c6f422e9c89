"""Dropout whose masks are cheap to draw on the CPU.

    y = x m / (1 - p),  m independent, 1 with probability 1 - p

Source: Srivastava et al., "Dropout", JMLR 15, 2014. PyTorch samples a mask on the CPU value by
value, one double each; here a word of 64 bits decides four values, so p is rounded to a multiple of
2^-16 (and the factor goes by the rounded one: the mean is exact). Elsewhere and in compiled code
this is PyTorch's. For the backward pass a byte of each value is kept.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlp._autograd import Function

STEPS = 1 << 16


class Dropout(nn.Dropout):
    """`nn.Dropout`; masks come from torch's generator. `reference` leaves them to PyTorch."""

    reference = False

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and _draws_words(x, self.p)) or self.reference:
            return F.dropout(x, self.p, self.training)
        keep, factor = _words(x, self.p)
        return _Masked.apply(x, keep, factor)


def draw_dropout(x: Tensor, p: float) -> tuple[Tensor, Tensor, float]:
    """x after dropout, which values were kept (bool, the shape of x), and the factor of those.

    Outside of autograd, for those who keep the mask themselves; see `apply_mask`.
    """
    if _draws_words(x, p):
        keep, factor = _words(x, p)
        return apply_mask(x, keep, factor), keep, factor
    y, keep = torch.native_dropout(x, p, True)
    return y, keep, 0.0 if p == 1 else 1 / (1 - p)


def apply_mask(x: Tensor, keep: Tensor, factor: float) -> Tensor:
    """x times the factor where it is kept, else 0; also the derivative of dropout."""
    return x * keep.to(x.dtype).mul_(factor)


def _draws_words(x: Tensor, p: float) -> bool:
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return 0 < round(p * STEPS) < STEPS


def _words(x: Tensor, p: float) -> tuple[Tensor, float]:
    """False for round(2^16 p) of 2^16 values, and the factor that keeps the mean."""
    dropped = round(p * STEPS)
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    keep = words.view(torch.int16)[: x.numel()] >= dropped - STEPS // 2
    return keep.view(x.shape), STEPS / (STEPS - dropped)


class _Masked(Function):
    @staticmethod
    def forward(ctx, x, keep, factor):
        ctx.save_for_backward(keep)
        ctx.factor = factor
        return apply_mask(x, keep, factor)

    @staticmethod
    def backward(ctx, gradient):
        (keep,) = ctx.saved_tensors
        return apply_mask(gradient, keep, ctx.factor), None, None
