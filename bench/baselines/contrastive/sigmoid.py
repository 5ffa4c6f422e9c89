"""Implementations of SigLIP's loss, with and without gradients; a comparison of gpu_check.py.

The loss of N pairs is the sum over all N x N pairs of -log sigmoid(z) for the positives and
-log sigmoid(-z) for the others, z = scale <x, y> + bias, divided by N (arXiv 2303.15343).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from _harness.measure import BOUND, DTYPES, OURS, Implementation
from torch import Tensor

from baselines.contrastive import features
from baselines.contrastive.softmax import compiled, matmuls

# As SigLIP starts: temperature 10, bias -10.
SCALE, BIAS = 10.0, -10.0
RESULTS = ("loss", "d_image", "d_text", "d_scale", "d_bias")
JUDGED = RESULTS[:3]
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Inputs:
    """image, text: [N, D] of one dtype; scale, bias: float32 scalars."""

    image: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor


def draw(n: int, dim: int, dtype: str, device: str) -> Inputs:
    """Random unit features of n pairs; the same for the same arguments."""
    image, text = features.pairs(features.RANDOM, n, dim)
    kind = DTYPES[dtype]
    numbers = (torch.tensor(number, device=device) for number in (SCALE, BIAS))
    return Inputs(image.to(device, kind), text.to(device, kind), *numbers)


def run(make_loss: Callable[[], Loss], backward: bool, inputs: Inputs) -> Callable[[], dict]:
    """A call that computes the loss and, if asked, gradients on leaves over the same storage."""
    loss = make_loss()
    tensors = (inputs.image, inputs.text, inputs.scale, inputs.bias)
    leaves = [tensor.detach().requires_grad_(backward) for tensor in tensors]

    def call() -> dict[str, Tensor]:
        value = loss(*leaves)
        gradients = torch.autograd.grad(value, leaves) if backward else ()
        return dict(zip(RESULTS, (value.detach(), *gradients), strict=False))

    return call


def ours() -> Loss:
    from fastvlp.ops import sigmoid_contrastive

    return lambda image, text, scale, bias: sigmoid_contrastive(image, text, scale, bias)


def eager() -> Loss:
    """The formula on one N x N matrix."""

    def call(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        logits = scale * image @ text.T + bias
        signs = 2 * torch.eye(len(logits), device=logits.device, dtype=logits.dtype) - 1
        return -F.logsigmoid(signs * logits).sum() / len(logits)

    return call


def autocast(dtype: torch.dtype, device: str) -> Loss:
    loss = eager()

    def call(*arguments: Tensor) -> Tensor:
        with torch.autocast(device, dtype):
            return loss(*arguments)

    return call


def implementations(dtype: str, device: str, backward: bool) -> list[Implementation]:
    """Ours, with a backward pass the bound, and the peers."""
    low = DTYPES[dtype] != torch.float32
    name = "eager autocast" if low else "eager"
    make = functools.partial(autocast, DTYPES[dtype], device) if low else eager
    found = [
        Implementation(OURS, functools.partial(run, ours, backward)),
        Implementation(name, functools.partial(run, make, backward)),
        Implementation(
            f"{name} compiled",
            functools.partial(run, functools.partial(compiled, make), backward),
            compiled=True,
        ),
    ]
    if backward:
        note = "torch.mm for 3 matmuls alone: the logits and the two gradients"
        found.append(Implementation(BOUND, functools.partial(matmuls, 1), bound=True, note=note))
    return found


def float64_reference(backward: bool, inputs: Inputs, rows: int = 512) -> Mapping[str, Tensor]:
    """Loss and gradients in float64 from the inputs as they are, in blocks of rows."""
    image, text = inputs.image.double(), inputs.text.double()
    scale, bias, n = inputs.scale.double(), inputs.bias.double(), len(inputs.image)
    loss, d_scale, d_bias = (torch.zeros_like(scale) for _ in range(3))
    d_image, d_text = torch.zeros_like(image), torch.zeros_like(text)
    for start in range(0, n, rows):
        block = slice(start, min(start + rows, n))
        similarities = image[block] @ text.T
        logits = scale * similarities + bias
        # -log sigmoid(-z) for all, then a positive's -log sigmoid(z) is that less z.
        loss += F.softplus(logits).sum() - logits.diagonal(start).sum()
        slope = torch.sigmoid(logits)
        slope.diagonal(start).sub_(1)
        d_scale += (slope * similarities).sum()
        d_bias += slope.sum()
        d_image[block] = slope @ text
        d_text += slope.T @ image[block]
    factors = (1, scale, scale, 1, 1)
    sums = (loss, d_image, d_text, d_scale, d_bias)
    found = {name: f * s / n for name, f, s in zip(RESULTS, factors, sums, strict=True)}
    return found if backward else {"loss": found["loss"]}
