"""Pairs of word and patch features, and ViLT's distance written out entry by entry."""

import math
from dataclasses import dataclass

import torch

from fastvlp.ops import word_patch_alignment_reference


@dataclass
class Pairs:
    text: torch.Tensor
    image: torch.Tensor
    text_padding: torch.Tensor
    image_padding: torch.Tensor
    upstream: torch.Tensor

    def masks(self):
        return self.text_padding, self.image_padding


@dataclass
class Result:
    distance: torch.Tensor
    plan: torch.Tensor
    text: torch.Tensor
    image: torch.Tensor


KINDS = ("random", "identical", "opposite", "matching", "zero")


def pairs(count, words, patches, dim, dtype, device="cpu", *, kind="random", masks="lengths",
          scale=1.0, strided=False, seed=0):  # fmt: skip
    """`kind` says how words and patches relate; `masks` how padding lies; NaN stands at padding."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    text, image = draw(count, words, dim), draw(count, patches, dim)
    if kind in ("identical", "opposite"):
        text[:] = draw(count, 1, dim)
        image[:] = text[:, :1] if kind == "identical" else -text[:, :1]
    elif kind == "matching":
        n = min(words, patches)
        image[:, :n] = text[:, :n] + 0.1 * image[:, :n]
    elif kind == "zero":
        text[:, ::2] = 0
    sides = []
    for features in (text, image):
        length = features.shape[1]
        if masks == "none":
            padding = torch.zeros(count, length, dtype=torch.bool)
        elif masks == "holes":
            padding = torch.rand(count, length, generator=g) < 0.4
        else:
            lengths = torch.randint(0, length + 1, (count, 1), generator=g)
            padding = torch.arange(length) >= lengths
        features = (scale * features).to(dtype).masked_fill(padding[..., None], math.nan)
        if strided:
            wide = torch.full((count, length + 2, dim + 5), math.nan, dtype=dtype)
            wide[:, 1:-1, :dim] = features
            features = wide.to(device)[:, 1:-1, :dim]
        sides.append((features.to(device), padding.to(device)))
    upstream = draw(count).to(torch.float32).to(device)
    if kind == "zero" and dtype == torch.float16:
        upstream /= 100  # so that float16 holds the gradients of zero rows, 1e5 times their terms
    return Pairs(sides[0][0], sides[1][0], sides[0][1], sides[1][1], upstream)


def run(function, case, dtype=None, **kwargs):
    """Distance, plan and gradients, all inputs in `dtype` (None: as they are)."""
    text = case.text.detach().to(dtype or case.text.dtype).requires_grad_()
    image = case.image.detach().to(dtype or case.image.dtype).requires_grad_()
    distance, plan = function(text, image, *case.masks(), return_plan=True, **kwargs)
    (case.upstream.to(distance) * distance).sum().backward()
    return Result(distance.detach(), plan.detach(), text.grad, image.grad)


def gradient_terms(case, plan):
    """Norms of the terms that each side's gradient is a sum of: they bound its rounding."""
    sides = []
    for features, padding in ((case.text, case.text_padding), (case.image, case.image_padding)):
        kept = features.double().masked_fill(padding[..., None], 0)
        norm = kept.norm(dim=-1, keepdim=True).clamp_min(1e-5)
        sides.append((kept / norm, 1 / norm))
    upstream = case.upstream.double().abs()[:, None, None]
    (x, x_factor), (y, y_factor) = sides
    plan = plan.double()
    return (
        (upstream * x_factor * (plan @ y.abs())).norm().item(),
        (upstream * y_factor * (plan.mT @ x.abs())).norm().item(),
    )


def opposite(dtype=torch.float32, device="cpu"):
    """Pairs of words and patches in two opposite directions, and the first also in a third one:
    at cost 2 some mass has to go through entries that die out in float64, too. One pair of five
    has a word and two patches more, which are padding."""
    text, image = torch.zeros(3, 5, 8, dtype=dtype), torch.zeros(3, 5, 8, dtype=dtype)
    text[:, :3, 0] = torch.tensor([1.0, -1.0, -1.0])
    image[:, :3, 0] = torch.tensor([1.0, 1.0, -1.0])
    text[0, 3, 1] = 1
    text[2, :3, 0], image[2, :3, 0] = image[2, :3, 0].clone(), text[2, :3, 0].clone()
    masks = ((t == 0).all(-1) for t in (text, image))
    return Pairs(*(t.to(device) for t in (text, image, *masks, torch.ones(3))))


def sharpness(beta=0.5, iterations=50, **_):
    """Relative rounding of a plan whose costs, of order 1, are right to a float32 rounding.

    Up to scalings, an entry of the plan is exp(-iterations * C / beta).
    """
    return torch.finfo(torch.float32).eps * (1 + iterations / beta)


def distance_rounding(true):
    """What a distance is off when the norms and factors of two rows and its own sum are rounded."""
    scale = len(true.distance) ** 0.5 + true.distance.norm().item()
    return 2 * torch.finfo(torch.float32).eps * scale


def exact(case, **kwargs):
    return run(word_patch_alignment_reference, case, torch.float64, **kwargs)


def entry_by_entry(case, beta=0.5, iterations=50, inner=1):
    """ViLT's distances with its padding terms and no tensor algebra at all, in Python floats."""
    distances = []
    for b in range(len(case.text)):
        pads = [case.text_padding[b].tolist(), case.image_padding[b].tolist()]
        words = [_unit(v, pad) for v, pad in zip(case.text[b].tolist(), pads[0], strict=True)]
        patches = [_unit(v, pad) for v, pad in zip(case.image[b].tolist(), pads[1], strict=True)]
        n, m = len(words) - sum(pads[0]), len(patches) - sum(pads[1])
        if n == 0 or m == 0:
            distances.append(0.0)
            continue
        rows, cols = range(len(words)), range(len(patches))
        open_ = [[not (pads[0][i] or pads[1][j]) for j in cols] for i in rows]
        cost = [
            [1 - _dot(words[i], patches[j]) if open_[i][j] else 0.0 for j in cols] for i in rows
        ]
        plan = [[1.0 if open_[i][j] else 0.0 for j in cols] for i in rows]
        sigma = [0.0 if pads[0][i] else 1 / n for i in rows]
        for _ in range(iterations):
            q = [[math.exp(-cost[i][j] / beta) * plan[i][j] for j in cols] for i in rows]
            for _ in range(inner):
                delta = [
                    1 / (m * sum(q[i][j] * sigma[i] for i in rows) + 1e4 * pads[1][j]) for j in cols
                ]
                sigma = [
                    1 / (n * sum(q[i][j] * delta[j] for j in cols) + 1e4 * pads[0][i]) for i in rows
                ]
            plan = [[delta[j] * q[i][j] * sigma[i] for j in cols] for i in rows]
        distances.append(sum(cost[i][j] * plan[i][j] for i in rows for j in cols))
    return torch.tensor(distances, dtype=torch.float64)


def _unit(vector, padded):
    if padded:
        return [0.0] * len(vector)
    length = max(math.sqrt(_dot(vector, vector)), 1e-5)
    return [v / length for v in vector]


def _dot(a, b):
    return math.fsum(p * q for p, q in zip(a, b, strict=True))
