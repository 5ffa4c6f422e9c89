"""CLIP's ResNet: three convolutions first, average pools where it strides, attention at the end.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021
(section 2.4); average pools before strided convolutions after Zhang, "Making Convolutional Networks
Shift-Invariant Again", arXiv 1904.11486. Parameter names and initialisation are OpenAI's.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlp.models.base import ReferenceMixin, plain_attention

EXPANSION = 4


class Bottleneck(nn.Module):
    """relu(shortcut + 1x1, 3x3, 1x1 convolutions), the pool of size `stride` after the second.

    [n, inputs, h, w] → [n, 4 planes, h / stride, w / stride]
    """

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        outputs = EXPANSION * planes
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(planes, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                OrderedDict(
                    [
                        ("-1", nn.AvgPool2d(stride)),
                        ("0", nn.Conv2d(inputs, outputs, 1, bias=False)),
                        ("1", nn.BatchNorm2d(outputs)),
                    ]
                )
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(self.pool(out)))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class AttentionPool(ReferenceMixin):
    """The mean of a feature map attends to the map and to itself: [n, width, h, w] → [n, outputs].

    Only the mean asks, so that with x the positions and h a head the keys and values need not be
    projected: q_hᵀ (K_h x_j + b_h) = (K_hᵀ q_h)ᵀ x_j + q_hᵀ b_h, and the same for
    Σ_j p_hj (V_h x_j + c_h) = V_h Σ_j p_hj x_j + c_h. That takes 2 width² + 2 heads · positions ·
    width multiplications in place of 2 positions · width².
    """

    def __init__(self, positions: int, width: int, heads: int, outputs: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(positions, width) * width**-0.5)
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, outputs)
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.c_proj):
            nn.init.normal_(layer.weight, std=width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)
        x = x + self.positional_embedding.to(x.dtype)
        return self.c_proj(self._attend(x) if self.reference else self._attend_unprojected(x))

    def _attend(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(rows).unflatten(-1, (self.heads, -1))
            for layer, rows in ((self.q_proj, x[:, :1]), (self.k_proj, x), (self.v_proj, x))
        )
        return plain_attention(q, k, v).flatten(1)

    def _attend_unprojected(self, x: Tensor) -> Tensor:
        """[n, positions, width] → [n, width]"""
        heads = self.heads
        q = self.q_proj(x[:, 0]).unflatten(-1, (heads, -1))
        q = q * q.shape[-1] ** -0.5
        key, value = (
            layer.weight.unflatten(0, (heads, -1)) for layer in (self.k_proj, self.v_proj)
        )
        towards = torch.einsum("nhd,hdw->nhw", q, key)
        shift = (q * self.k_proj.bias.unflatten(0, (heads, -1))).sum(-1, keepdim=True)
        weights = (towards @ x.transpose(1, 2) + shift).softmax(-1)
        pooled = torch.einsum("nhw,hdw->nhd", weights.to(x.dtype) @ x, value)
        return pooled.flatten(1) + self.v_proj.bias


class ModifiedResNet(ReferenceMixin):
    """Images [n, 3, size, size] → features [n, embed_dim], not normalised."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.vision_width
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        inputs = width
        for stage, blocks in enumerate(config.vision_layers):
            planes = width * 2**stage
            layers = []
            for block in range(blocks):
                layers.append(Bottleneck(inputs, planes, 2 if stage and not block else 1))
                inputs = EXPANSION * planes
                # A block begins as its shortcut.
                nn.init.zeros_(layers[-1].bn3.weight)
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        positions = (config.image_size // config.patch_size) ** 2 + 1
        self.attnpool = AttentionPool(positions, inputs, config.vision_heads, config.embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        x = images.to(self.conv1.weight.dtype)
        if not self.reference and self._sums_well(x):
            x = x.contiguous(memory_format=torch.channels_last)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        x = F.avg_pool2d(x, 2)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return self.attnpool(x)

    def _sums_well(self, x: Tensor) -> bool:
        """Whether batch norm may run in the layout that convolutions like best.

        Channels last, a training step in bfloat16 takes 0.67 times the time on a CPU. But
        there batch norm adds up float32 values one by one, in both directions: over 200,000 of
        them its result is off by 1e-5, where the other layout is off by 1e-7.
        """
        half = torch.is_autocast_enabled(x.device.type) or x.dtype in (torch.bfloat16, torch.half)
        sums = self.training or torch.is_grad_enabled()
        return half or x.device.type != "cpu" or not sums
