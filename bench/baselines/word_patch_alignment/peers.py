"""What word_patch_alignment.py compares: implementations of ViLT's transport distance."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from _harness.measure import BOUND, OURS, Implementation
from torch import Tensor

Distance = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Inputs:
    """text [B, Lx, D], image [B, Ly, D] of one dtype; bool masks, True at padding; upstream [B]."""

    text: Tensor
    image: Tensor
    text_padding: Tensor
    image_padding: Tensor
    upstream: Tensor

    @property
    def masks(self) -> tuple[Tensor, Tensor]:
        return self.text_padding, self.image_padding


def forward(make_distance: Callable[[], Distance], inputs: Inputs) -> Callable[[], dict]:
    """A call that computes the distances alone."""
    distance = make_distance()

    @torch.no_grad()
    def call() -> dict[str, Tensor]:
        return {"distance": distance(inputs.text, inputs.image, *inputs.masks)}

    return call


def forward_backward(make_distance: Callable[[], Distance], inputs: Inputs) -> Callable[[], dict]:
    """A call that computes distances and gradients on fresh leaves over the same storage."""
    distance = make_distance()
    leaves = [t.detach().requires_grad_() for t in (inputs.text, inputs.image)]

    def call() -> dict[str, Tensor]:
        value = distance(*leaves, *inputs.masks)
        d_text, d_image = torch.autograd.grad(value, leaves, inputs.upstream.to(value))
        return {"distance": value.detach(), "d_text": d_text, "d_image": d_image}

    return call


def ours() -> Distance:
    from fastvlp.ops import word_patch_alignment

    return word_patch_alignment


def batched_loop() -> Distance:
    return vilt_distance


def compiled() -> Distance:
    # It looks for a GPU each time it is loaded, and warns each time that there is none.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    torch._dynamo.config.recompile_limit = 256
    return torch.compile(vilt_distance, dynamic=False)


def vilt_distance(
    text: Tensor, image: Tensor, text_padding: Tensor, image_padding: Tensor
) -> Tensor:
    """ViLT's formulation: the whole batch in each step of the loop, padding kept in place."""
    wide = torch.float64 if text.dtype == torch.float64 else torch.float32
    x, y = (F.normalize(side.to(wide), dim=-1, eps=1e-5) for side in (text, image))
    either = text_padding.unsqueeze(2) | image_padding.unsqueeze(1)
    cost = (1 - x @ y.transpose(1, 2)).masked_fill(either, 0)
    plan = vilt_plan(cost.detach(), text_padding, image_padding, either)
    # The trace of cost @ plan over the diagonal, as one sum over the entries it consists of.
    return (cost * plan.transpose(1, 2)).sum((1, 2))


@torch.no_grad()
def vilt_plan(
    cost: Tensor, text_padding: Tensor, image_padding: Tensor, either: Tensor,
    beta: float = 0.5, iterations: int = 50,
) -> Tensor:  # fmt: skip
    """[B, patches, words], one inner scaling a step, one batched matmul each."""
    either = either.transpose(1, 2)
    words = (~text_padding).sum(1).to(cost).view(-1, 1, 1)
    patches = (~image_padding).sum(1).to(cost).view(-1, 1, 1)
    word_term = 1e4 * text_padding.to(cost).unsqueeze(1)
    patch_term = 1e4 * image_padding.to(cost).unsqueeze(1)
    kernel = torch.exp(-cost.transpose(1, 2) / beta).masked_fill(either, 0)
    plan = torch.ones_like(kernel).masked_fill(either, 0)
    sigma = (1 / words).expand(-1, -1, cost.shape[1]).masked_fill(text_padding.unsqueeze(1), 0)
    for _ in range(iterations):
        q = kernel * plan
        delta = 1 / (patches * torch.bmm(q, sigma.transpose(1, 2)).transpose(1, 2) + patch_term)
        sigma = 1 / (words * torch.bmm(delta, q) + word_term)
        plan = delta.transpose(1, 2) * q * sigma
    return plan.masked_fill(either, 0)


def matmuls(inputs: Inputs) -> Callable[[], None]:
    """The matmuls no implementation can do without: the costs and, at fwd+bwd, two with plans."""
    pairs, words, _ = inputs.text.shape
    x, y = inputs.text.float(), inputs.image.float()
    cost = torch.randn(pairs, words, y.shape[1], device=x.device)
    dx, dy = torch.empty_like(x), torch.empty_like(y)

    def call() -> None:
        torch.bmm(x, y.mT, out=cost)
        torch.bmm(cost, y, out=dx)
        torch.bmm(cost.mT, x, out=dy)

    return call


def implementations(phase: str) -> list[Implementation]:
    run = forward if phase == "fwd" else forward_backward
    found = [
        Implementation(OURS, functools.partial(run, ours)),
        Implementation("batched loop", functools.partial(run, batched_loop)),
        Implementation("batched loop compiled", functools.partial(run, compiled), compiled=True),
    ]
    if phase != "fwd":
        note = "torch.bmm for the costs and the two gradients alone"
        found.insert(1, Implementation(BOUND, matmuls, bound=True, note=note))
    return found


def float64_reference(inputs: Inputs) -> Mapping[str, Tensor]:
    from fastvlp.ops import word_patch_alignment_reference

    wide = Inputs(inputs.text.double(), inputs.image.double(), *inputs.masks, inputs.upstream)
    return forward_backward(lambda: word_patch_alignment_reference, wide)()
