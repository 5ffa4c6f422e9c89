"""Labelled pictures from a folder that has one folder for each class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
# Of CLIP's training data; Radford et al. release their models with them.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def find(folder: Path) -> dict[str, list[Path]]:
    """The pictures of each class, classes and pictures sorted by name.

    Raises:
        ValueError: there are no classes, or one has no picture.
    """
    found = {
        each.name: sorted(p for p in each.rglob("*") if p.suffix.lower() in _EXTENSIONS)
        for each in sorted(Path(folder).iterdir())
        if each.is_dir()
    }
    empty = [name for name, pictures in found.items() if not pictures]
    if not found or empty:
        reason = f"none in {empty[0]!r}" if empty else "no folders"
        raise ValueError(f"images: expected a folder of pictures for each class, got {reason}")
    return found


def share(found: dict[str, list[Path]], rank: int, world_size: int) -> list[tuple[Path, int]]:
    """This rank's pictures, each with the number of its class."""
    labelled = [(path, i) for i, paths in enumerate(found.values()) for path in paths]
    return labelled[rank::world_size]


@torch.inference_mode()
def encode(
    labelled: Sequence[tuple[Path, int]],
    encode_images: Callable[[Tensor], Tensor],
    size: int,
    batch_size: int,
    device: torch.device,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> tuple[Tensor, Tensor]:
    """Features [n, dim] with rows of norm 1, and labels int64 [n]."""
    parts = []
    for at in range(0, max(1, len(labelled)), batch_size):
        rows = [read(path, size, mean, std) for path, _ in labelled[at : at + batch_size]]
        images = torch.stack(rows) if rows else torch.empty(0, 3, size, size)
        features = encode_images(images.to(device)).float()
        parts.append(torch.nn.functional.normalize(features, dim=-1))
    labels = torch.tensor([label for _, label in labelled], dtype=torch.int64)
    return torch.cat(parts), labels.to(device)


def read(path: Path, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """A picture as CLIP is evaluated on it: shorter side resized, middle cut out, normalised."""
    from PIL import Image

    with Image.open(path) as opened:
        image = opened.convert("RGB")
    scale = size / min(image.size)
    width, height = (max(size, int(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.crop((left, top, left + size, top + size))
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return (values - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
