"""Drawn features and gradients of the three ways to compute a loss: ours, eager, float64."""

from dataclasses import dataclass

import torch


@dataclass
class Result:
    loss: torch.Tensor
    image: torch.Tensor
    text: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor


def features(n, dim, dtype, device, *, norm=1.0, strided=False, seed=0):
    """Correlated pairs: some easy, some hard. `norm` None leaves them unnormalised."""
    g = torch.Generator().manual_seed(seed)
    image = torch.randn(n, dim, generator=g, dtype=torch.float64)
    text = image + 2 * torch.randn(n, dim, generator=g, dtype=torch.float64)
    pair = []
    for t in (image, text):
        if norm is not None:
            t = norm * torch.nn.functional.normalize(t, dim=1)
        t = t.to(dtype).to(device)
        if strided:
            wide = torch.full((n, 2 * dim + 3), float("nan"), dtype=dtype, device=device)
            wide[:, :dim] = t
            t = wide[:, :dim]
        pair.append(t)
    return pair


def run(loss_function, image, text, scale, bias, dtype=None, upstream=1.0, **kwargs):
    """Loss and every gradient, all inputs in `dtype` (None: as they are)."""
    dtype = dtype or image.dtype
    scalars = torch.float64 if dtype == torch.float64 else torch.float32
    image = image.detach().to(dtype).requires_grad_()
    text = text.detach().to(dtype).requires_grad_()
    scale = torch.tensor(scale, dtype=scalars, device=image.device, requires_grad=True)
    bias = torch.tensor(bias, dtype=scalars, device=image.device, requires_grad=True)
    loss = loss_function(image, text, scale, bias, **kwargs)
    (upstream * loss).backward()
    return Result(loss.detach(), image.grad, text.grad, scale.grad, bias.grad)
