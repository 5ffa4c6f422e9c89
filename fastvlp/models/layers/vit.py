"""The vision transformer of ALBEF and ViLT, with the parameter names of timm's ViT and DeiT.

Dosovitskiy et al., "An Image is Worth 16x16 Words", arXiv 2010.11929, section 3.1: layer norm
before attention and before the feed-forward part, exact GELU, epsilon 1e-6.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlp.models.base import ReferenceMixin, plain_attention
from fastvlp.nn import (
    Dropout,
    LayerNorm,
    Linear,
    Norm,
    attention,
    feed_forward,
    linear,
    norm_linear,
)
from fastvlp.ops import cross_attention

EPS = 1e-6


class Segments(NamedTuple):
    """Sequences that lie packed, one after another, in the rows of one matrix.

    Attributes:
        cu_seqlens: int32 [sequences + 1], each one's first row.
        max_seqlen: the longest.
    """

    cu_seqlens: Tensor
    max_seqlen: int


class PatchEmbed(ReferenceMixin):
    """[n, 3, height, width] → [n, rows, columns, width of the model]"""

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        # A convolution whose stride is its size is one matmul, and the matmul is faster.
        size = self.proj.kernel_size[0]
        patches = images.unflatten(3, (-1, size)).unflatten(2, (-1, size))
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)
        project = F.linear if self.reference else linear
        return project(patches, self.proj.weight.flatten(1), self.proj.bias)


class Attention(ReferenceMixin):
    """Self-attention with q, k and v from one projection, in this order."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)
        self.dropout = Dropout(dropout)

    def forward(
        self, x: Tensor, *, key_mask: Tensor | None = None, segments: Segments | None = None
    ) -> Tensor:
        """[batch, length, width], or packed [rows, width] with `segments`, to the same shape.

        key_mask: bool [batch, length], False for masked keys.
        """
        return self.attend(self.qkv(x), key_mask, segments)

    def attend(self, qkv: Tensor, key_mask: Tensor | None, segments: Segments | None) -> Tensor:
        """What follows the projection to q, k and v."""
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(-3)
        if segments is not None:
            cu, longest = segments
            out = cross_attention(q, k, v, cu, cu, max_seqlen_q=longest, max_seqlen_k=longest)
        else:
            attend = plain_attention if self.reference else attention
            out = attend(q, k, v, key_mask=key_mask)
        return self.dropout(self.proj(out.flatten(-2)))


class Mlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, width: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(x)))))


class Block(ReferenceMixin):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width, EPS)
        self.attn = Attention(width, heads, dropout)
        self.norm2 = LayerNorm(width, EPS)
        self.mlp = Mlp(width, 4 * width, dropout)

    def forward(
        self, x: Tensor, *, key_mask: Tensor | None = None, segments: Segments | None = None
    ) -> Tensor:
        if self.reference:
            x = x + self.attn(self.norm1(x), key_mask=key_mask, segments=segments)
            return x + self.mlp(self.norm2(x))
        qkv = norm_linear(x, Norm.of(self.norm1), self.attn.qkv.weight, self.attn.qkv.bias)
        x = x + self.attn.attend(qkv, key_mask, segments)
        fc1, fc2, dropout = self.mlp.fc1, self.mlp.fc2, self.mlp.dropout
        y = feed_forward(
            x, Norm.of(self.norm2), fc1.weight, fc1.bias, fc2.weight, fc2.bias,
            dropout_p=dropout.p if self.training else 0.0,
        )  # fmt: skip
        return x + dropout(y)


class VisionTransformer(nn.Module):
    """Images to tokens, the class token first.

    Args:
        image_size: pixels on a side.
        patch: pixels on a side of a patch; divides `image_size`.
        width, layers, heads: of the transformer; `heads` divides `width`.
        dropout: after the position embeddings, the projections and in the feed-forward parts.
    """

    def __init__(
        self,
        image_size: int,
        patch: int,
        width: int,
        layers: int,
        heads: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        for name, whole, part in (("patch", image_size, patch), ("heads", width, heads)):
            if whole % part:
                raise ValueError(f"{name}: expected a divisor of {whole}, got {part}")
        self.image_size = image_size
        self.patch_embed = PatchEmbed(patch, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, (image_size // patch) ** 2 + 1, width))
        self.pos_drop = Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = LayerNorm(width, EPS)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """timm's: truncated normal of 0.02, zero biases."""
        for weight in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(weight, std=0.02)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """[n, 3, image_size, image_size] floating point → [n, 1 + patches, width]"""
        self.check(images)
        patches = self.patch_embed(images.to(self.cls_token.dtype)).flatten(1, 2)
        class_token = self.cls_token.to(patches.dtype).expand(len(patches), -1, -1)
        x = torch.cat([class_token, patches], 1) + self.pos_embed.to(patches.dtype)
        x = self.pos_drop(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def check(self, images: Tensor) -> None:
        if not images.is_floating_point():
            raise TypeError(
                f"images: expected floating point (normalised pixels), got {images.dtype}"
            )
        expected = (3, self.image_size, self.image_size)
        if images.ndim != 4 or images.shape[1:] != expected:
            raise ValueError(
                f"images: expected [n, 3, {self.image_size}, {self.image_size}], "
                f"got {list(images.shape)}; resize and crop them first"
            )


def init_by_width(layers: nn.Module) -> None:
    """Draw the weights of all linear layers from N(0, 1 / inputs), for narrow models.

    Published models take 0.02, which suits widths of about 768 and, in narrow ones that train from
    scratch, leaves little of the input in what a layer adds to it.
    """
    for layer in layers.modules():
        if isinstance(layer, nn.Linear):
            # What narrows is added to the residual stream, which is not to grow with depth.
            narrows = layer.in_features > layer.out_features
            std = layer.in_features**-0.5 * (0.7 if narrows else 1.0)
            nn.init.normal_(layer.weight, std=std)
