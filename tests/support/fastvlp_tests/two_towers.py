"""Two small towers, their loss by definition, and batches for them.

Plain modules only, because a spawned process imports this file by its name.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

from fastvlp_tests.tolerance import assert_as_accurate, epsilon

WIDTH = 6


class Towers(nn.Module):
    """Two small encoders and a temperature; a buffer that DDP broadcasts."""

    def __init__(self, width=WIDTH, dropout=0.0, dtype=torch.float64, scalar=True):
        super().__init__()
        self.image = self._tower(width, dropout)
        self.text = self._tower(width, dropout)
        self.logit_scale = nn.Parameter(torch.tensor(1.5 if scalar else [1.5]))
        self.register_buffer("shift", torch.full((width,), 0.1))
        self.to(dtype)

    def _tower(self, width, dropout):
        return nn.Sequential(
            nn.Linear(width, 3 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(3 * width, width)
        )

    def forward(self, images, texts):
        x = F.normalize(self.image(images) + self.shift, dim=-1)
        y = F.normalize(self.text(texts), dim=-1)
        return x, y, self.logit_scale.exp().sum()


def contrastive(x, y, scale):
    """The definition of the loss, in any dtype."""
    logits = scale * x @ y.T
    positives = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, positives) + F.cross_entropy(logits.T, positives)) / 2


def batch(rows, seed, dtype=torch.float64, width=WIDTH):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=g, dtype=torch.float64)
    return x.to(dtype), (x + torch.randn(x.shape, generator=g, dtype=torch.float64)).to(dtype)


def gradients(model):
    """The gradients by parameter name, of sharded parameters too, zeros where there is none."""
    result = {}
    for name, parameter in model.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        result[name.removeprefix("module.")] = grad.detach().clone()
    return result


def towers(seed=0, kind=Towers, **kwargs):
    torch.manual_seed(seed)
    return kind(**kwargs)


def plain_step(model, loss, *inputs):
    """Loss and gradients of the step on the whole batch, by a copy of `model`."""
    model = copy.deepcopy(model)
    model.zero_grad()
    value = loss(*model(*inputs))
    value.backward()
    return value.detach(), gradients(model)


def rounding(name, exact, rows, width, dtype):
    """What a gradient may differ by for the order of sums over the batch and hidden features."""
    # The scale's gradient is a sum of logits, up to exp(1.5) in size, which may cancel.
    size = max(exact.norm().item(), math.exp(1.5) if name == "logit_scale" else 0.0)
    return (rows + 3 * width) * epsilon(dtype) * size


def assert_equal_to_rounding(ours, plain, rows, width=WIDTH):
    assert ours.keys() == plain.keys()
    for name, exact in plain.items():
        floor = rounding(name, exact, rows, width, exact.dtype)
        assert_as_accurate(name, ours[name], exact, exact.double(), floor)
