"""Plans carried out on decoded images: by Pillow, and by the compiled kernel with the same bits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch

from fastvlp.data.images.randaugment import apply
from fastvlp.data.images.recipes import Plan, Recipe
from fastvlp.data.optional import require
from fastvlp.ops import compiled


def value_table(recipe: Recipe) -> torch.Tensor:
    """The normalised float of every 8-bit value, float32 ``[3, 256]``.

    Computed as torchvision's ToTensor and Normalize compute it.
    """
    values = torch.arange(256, dtype=torch.float32) / 255
    mean, std = (
        torch.tensor(each, dtype=torch.float32)[:, None] for each in (recipe.mean, recipe.std)
    )
    return (values - mean) / std


def canvas(plans: Sequence[Plan], recipe: Recipe) -> tuple[int, int]:
    """Height and width of a batch that holds every plan's result.

    A batch without images has those of a square image, which a model takes as well.
    """
    windows = [p.window for p in plans or [recipe.plan(64, 64, (0.0,) * recipe.uses)]]
    return max(w[3] for w in windows), max(w[2] for w in windows)


def pixel_mask(plans: Sequence[Plan], height: int, width: int) -> torch.Tensor:
    """bool ``[n, height, width]``: where the batch holds pixels and not padding."""
    sizes = torch.tensor([p.window[2:] for p in plans], dtype=torch.int64).view(-1, 2)
    rows = torch.arange(height) < sizes[:, 1:]
    columns = torch.arange(width) < sizes[:, :1]
    return rows[:, :, None] & columns[:, None, :]


def transformed(image, plan: Plan):
    """A plan carried out by Pillow on a Pillow image."""
    pil = require("PIL.Image")
    for operation in plan.before:
        image = apply(image, operation)
    left, top, width, height = plan.crop
    image = image.crop((left, top, left + width, top + height))
    image = image.resize(plan.size, pil.Resampling.BICUBIC)
    left, top, width, height = plan.window
    image = image.crop((left, top, left + width, top + height))
    if plan.flip:
        image = image.transpose(pil.Transpose.FLIP_LEFT_RIGHT)
    for operation in plan.after:
        image = apply(image, operation)
    return image


def into_batch_by_pillow(images: Sequence, plans: Sequence[Plan], table, out) -> None:
    """Pillow images into their places ``out[i]``; what they do not cover becomes 0."""
    # By numpy: torch's indexing would use threads of its own, beside the loader's.
    values = table.numpy()
    for image, plan, place in zip(images, plans, out.numpy(), strict=True):
        pixels = np.array(transformed(image, plan))
        height, width = pixels.shape[:2]
        place[:, height:], place[:, :, width:] = 0, 0
        for channel in range(3):
            place[channel, :height, :width] = values[channel][pixels[..., channel]]


def into_batch(images: Sequence[np.ndarray], plans: Sequence[Plan], table, out) -> None:
    """The same by the compiled kernel, from arrays uint8 ``[h, w, 3]``."""
    if reasons := compiled.load():
        raise RuntimeError(f"images: {'; '.join(reasons)}")
    rows, operations = _tables(plans)
    tensors = [torch.from_numpy(image) for image in images]
    torch.ops.fastvlp.transform_images(tensors, rows, operations, table, _may_start_down(), out)


@cache
def _may_start_down() -> bool:
    """Whether this Pillow resizes some images down before across.

    The order shows in single bits, and the compiled kernel takes that of the Pillow at hand.
    """
    pil = require("PIL.Image")
    image = np.arange(40 * 6 * 3, dtype=np.uint32).reshape(40, 6, 3) * 2654435761 >> 24
    image = (image & 255).astype(np.uint8)
    across = pil.fromarray(image).resize((5, 40), pil.Resampling.BICUBIC)
    across = across.resize((5, 20), pil.Resampling.BICUBIC)
    at_once = pil.fromarray(image).resize((5, 20), pil.Resampling.BICUBIC)
    return across.tobytes() != at_once.tobytes()


def _tables(plans: Sequence[Plan]) -> tuple[torch.Tensor, torch.Tensor]:
    rows, operations = [], []
    for plan in plans:
        counts = len(operations), len(plan.before), len(plan.after)
        rows.append([*plan.crop, *plan.size, *plan.window, int(plan.flip), *counts])
        for each in (*plan.before, *plan.after):
            values = each.values + (0.0,) * (6 - len(each.values))
            operations.append([float(each.kind), *values, float(each.fill)])
    return (
        torch.tensor(rows, dtype=torch.int64).view(-1, 14),
        torch.tensor(operations, dtype=torch.float64).view(-1, 8),
    )
