"""Layer norm in float32 whatever the dtype of its input."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm(nn.LayerNorm):
    """Layer norm over the last dimension, computed in float32 and returned in the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype in (torch.float32, torch.float64):
            return super().forward(x)
        # Not left to the kernel: on the CPU its backward pass in half precision also adds up the
        # gradients of the gains in half precision, which over many rows loses them.
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)
