"""Dropout whose masks are cheap to draw on the CPU.

    y = x m / (1 - p),  m independent, 1 with probability 1 - p

Source: Srivastava et al., "Dropout", JMLR 15, 2014. PyTorch draws a mask on the CPU value by value,
one double each; here a word of 64 bits decides four values, so p is rounded to a multiple of 2^-16
(and the factor goes by the rounded one: the mean is exact). Elsewhere and in compiled code this is
PyTorch's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEPS = 1 << 16


class Dropout(nn.Dropout):
    """`nn.Dropout`; masks come from torch's generator. `reference` leaves them to PyTorch."""

    reference = False

    def forward(self, x: Tensor) -> Tensor:
        dropped = round(self.p * STEPS)
        draws = self.training and 0 < dropped < STEPS and x.device.type == "cpu"
        if not draws or self.reference or torch.compiler.is_compiling():
            return F.dropout(x, self.p, self.training)
        return x * _mask(x, dropped)


def _mask(x: Tensor, dropped: int) -> Tensor:
    """0 for `dropped` of 2^16 values, else the factor that keeps the mean; in the shape of x."""
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    keep = words.view(torch.int16)[: x.numel()] >= dropped - STEPS // 2
    return keep.view(x.shape).to(x.dtype).mul_(STEPS / (STEPS - dropped))
