"""Labelled images from a folder that has one folder for each class."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastvlp.data.image_folder import below
from fastvlp.data.images.conversion import RgbConversion
from fastvlp.data.images.integrity import ImageFault
from fastvlp.data.images.preprocess import Preprocess
from fastvlp.data.images.recipes import CLIP_MEAN as MEAN
from fastvlp.data.images.recipes import CLIP_STD as STD
from fastvlp.data.images.recipes import CentreCrop
from fastvlp.data.shards.stray_files import is_hidden


def find(folder: Path) -> dict[str, list[Path]]:
    """The images of each class, classes and images sorted by name; hidden ones are passed over.

    Raises:
        ValueError: there are no classes, or one has no image.
        OSError: a folder cannot be read.
    """
    found = {
        each.name: below(each)
        for each in sorted(Path(folder).iterdir())
        if each.is_dir() and not is_hidden(each.name)
    }
    empty = [name for name, paths in found.items() if not paths]
    if not found or empty:
        reason = f"none in {empty[0]!r}" if empty else "no folders"
        raise ValueError(f"images: expected a folder of images for each class, got {reason}")
    return found


def share(found: dict[str, list[Path]], rank: int, world_size: int) -> list[tuple[Path, int]]:
    """This rank's images, each with the number of its class."""
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
    convert: RgbConversion = RgbConversion(),
) -> tuple[Tensor, Tensor]:
    """Features [n, dim] with rows of norm 1, and labels int64 [n].

    Images that cannot be read or decoded are left out and named in a warning.
    """
    parts, labels, faults = [], [], []
    for at in range(0, max(1, len(labelled)), batch_size):
        rows = []
        for path, label in labelled[at : at + batch_size]:
            try:
                rows.append(read(path, size, mean, std, convert))
                labels.append(label)
            except ImageFault as fault:
                faults.append(str(fault))
        images = torch.stack(rows) if rows else torch.empty(0, 3, size, size)
        features = encode_images(images.to(device)).float()
        parts.append(torch.nn.functional.normalize(features, dim=-1))
    if faults:
        first = "; ".join(faults[:3])
        warnings.warn(
            f"images: {len(faults)} of {len(labelled)} left out; the first: {first}",
            stacklevel=2,
        )
    return torch.cat(parts), torch.tensor(labels, dtype=torch.int64, device=device)


def read(
    path: Path,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    convert: RgbConversion = RgbConversion(),
) -> Tensor:
    """An image as CLIP is evaluated on it: shorter side resized, centre cropped, normalised.

    Raises:
        ImageFault: the file cannot be read or decoded, or its sides differ too much; names the
            file.
    """
    return Preprocess(CentreCrop(size=size, mean=tuple(mean), std=tuple(std)), convert).read(path)
