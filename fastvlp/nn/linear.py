"""The linear layer on `fastvlp.ops.matmul`.

    y = x W^T + b

The same as PyTorch's but for the rate of float32 matmuls on a CPU with AMX tiles of bfloat16.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlp.ops.checks import check_tensor
from fastvlp.ops.matmul.api import takes_rows, unchecked_matmul


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`: [.., width] → [.., out], with weight [out, width], bias [out].

    Differentiable any number of times.

    Raises:
        TypeError: an argument is no tensor; the message names it.
    """
    # Of a few rows the matmul takes microseconds: no more is looked at than has to be.
    if not (
        isinstance(x, Tensor)
        and isinstance(weight, Tensor)
        and (bias is None or isinstance(bias, Tensor))
    ):
        _refuse(x, weight, bias)
    if not takes_rows(x, weight) or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    return unchecked_matmul(rows, weight.T, bias).view(*x.shape[:-1], weight.shape[0])


def _refuse(x, weight, bias) -> None:
    for name, t in (("x", x), ("weight", weight), ("bias", bias)):
        if name != "bias" or t is not None:
            check_tensor(name, t, floating=None)


class Linear(nn.Linear):
    """`nn.Linear` by `linear`. `reference` leaves the matmul to PyTorch.

    Examples:
        >>> import torch
        >>> from fastvlp.nn import Linear
        >>> Linear(16, 4)(torch.randn(2, 16)).shape
        torch.Size([2, 4])
    """

    reference = False

    def forward(self, x: Tensor) -> Tensor:
        return (F.linear if self.reference else linear)(x, self.weight, self.bias)
