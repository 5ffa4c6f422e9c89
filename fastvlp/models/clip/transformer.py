"""Layers of CLIP's transformers: self-attention and the residual block.

Parameter names are those of ``torch.nn.MultiheadAttention`` and of OpenAI's CLIP, which published
checkpoints use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlp.models.base import ReferenceMixin, plain_attention
from fastvlp.models.layers.vit import Segments
from fastvlp.nn import LayerNorm, Linear, Norm, attention, feed_forward, linear
from fastvlp.nn.feed_forward import ACTIVATIONS
from fastvlp.ops import cross_attention

Pick = Callable[[Tensor], Tensor]


class SelfAttention(ReferenceMixin):
    """Multi-head self-attention with biases; q, k and v come from one projection, in this order."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        x: Tensor,
        *,
        causal: bool = False,
        segments: Segments | None = None,
        pick: Pick | None = None,
    ) -> Tensor:
        """[batch, length, width], or packed [rows, width] with `segments`, to the same shape, or
        to that of ``pick(x)``."""
        if pick is None:
            q, k, v = self._project(x, 0, 3)
        else:
            (q,), (k, v) = self._project(pick(x), 0, 1), self._project(x, 1, 3)
        if segments is not None:
            cu, longest = segments
            one_each = torch.arange(len(q) + 1, dtype=cu.dtype, device=cu.device) if pick else cu
            out = cross_attention(
                q, k, v, one_each, cu, causal=causal,
                max_seqlen_q=1 if pick else longest, max_seqlen_k=longest,
            )  # fmt: skip
        else:
            attend = plain_attention if self.reference else attention
            out = attend(q, k, v, causal=causal)
        return self.out_proj(out.flatten(-2))

    def _project(self, x: Tensor, first: int, end: int) -> tuple[Tensor, ...]:
        """Numbers `first` to `end` of q, k and v: [.., width] → each [.., heads, head_dim]"""
        width = self.out_proj.in_features
        rows = slice(first * width, end * width)
        project = F.linear if self.reference else linear
        out = project(x, self.in_proj_weight[rows], self.in_proj_bias[rows])
        return out.unflatten(-1, (end - first, self.heads, -1)).unbind(-3)


class Mlp(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.c_fc = Linear(width, hidden)
        self.activation = activation
        self.c_proj = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[.., width] → the same shape."""
        return self.c_proj(ACTIVATIONS[self.activation](self.c_fc(x)))


class ResidualAttentionBlock(ReferenceMixin):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(width)
        self.attn = SelfAttention(width, heads)
        self.ln_2 = LayerNorm(width)
        self.mlp = Mlp(width, hidden, activation)

    def forward(self, x: Tensor, *, pick: Pick | None = None, **options: Any) -> Tensor:
        """As `SelfAttention.forward`, whose options are also these."""
        attended = self.attn(self.ln_1(x), pick=pick, **options)
        x = (x if pick is None else pick(x)) + attended
        if self.reference:
            return x + self.mlp(self.ln_2(x))
        c_fc, c_proj = self.mlp.c_fc, self.mlp.c_proj
        return x + feed_forward(
            x, Norm.of(self.ln_2), c_fc.weight, c_fc.bias, c_proj.weight, c_proj.bias,
            self.mlp.activation,
        )  # fmt: skip


class Transformer(nn.Module):
    """A stack of residual blocks on [batch, length, width], or on packed [rows, width].

    With `pick`, which takes from these the one row of each sequence that the caller reads, returns
    only that; the last block then leaves out what goes into no row but the others.
    """

    def __init__(self, width: int, layers: int, heads: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(
            ResidualAttentionBlock(width, heads, hidden, activation) for _ in range(layers)
        )

    def forward(self, x: Tensor, *, pick: Pick | None = None, **options: Any) -> Tensor:
        """Options: `causal` and `segments` of `SelfAttention.forward`."""
        *blocks, last = self.resblocks
        for block in blocks:
            x = block(x, **options)
        return last(x, pick=pick, **options)
