"""Random features and gradients of the three ways to compute a loss: ours, eager, float64."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fastvlp.ops import contrastive_reference


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


def well_fitted(n, dim, scale, norm, target, seed=0):
    """float32 features, the images' of length `norm`, whose contrastive loss is `target`."""
    g = torch.Generator().manual_seed(seed)
    image, other = (torch.randn(n, dim, generator=g, dtype=torch.float64) for _ in range(2))
    image = F.normalize(image, dim=1)
    other = F.normalize(other - (other * image).sum(1, keepdim=True) * image, dim=1)
    own, others = norm * image @ image.T, norm * image @ other.T
    low, high = -1.0, 1.0  # the cosine of the pairs
    for _ in range(30):
        cosine = (low + high) / 2
        sine, identity = math.sqrt(1 - cosine**2), torch.eye(n, dtype=torch.float64)
        above = contrastive_reference(cosine * own + sine * others, identity, scale) > target
        low, high = (cosine, high) if above else (low, cosine)
    return (norm * image).float(), (cosine * image + sine * other).float()


def eager_contrastive(image, text, scale, bias):
    """The loss as it is usually written."""
    logits = scale * image @ text.T + bias
    pairs = torch.arange(len(image))
    return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2


def relative_errors(results, exact, names):
    """Of each named value; root mean square over results and their exact counterparts."""
    found = {}
    for name in names:
        pairs = [(getattr(r, name), getattr(e, name)) for r, e in zip(results, exact, strict=True)]
        squares = [((got - true).norm() / true.norm()).item() ** 2 for got, true in pairs]
        found[name] = math.sqrt(sum(squares) / len(squares))
    return found
