"""All images of a folder, and their features; what cannot be read is left out and named."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvlp.data.images.integrity import ImageFault
from fastvlp.data.images.preprocess import Preprocess
from fastvlp.data.shards.folder_walk import Unread, walk
from fastvlp.data.shards.pairs import IMAGE_SUFFIXES
from fastvlp.data.shards.stray_files import is_hidden


def find_images(folder: str | os.PathLike[str]) -> list[Path]:
    """The images in a folder at any depth, sorted by path; hidden ones are passed over.

    Raises:
        FileNotFoundError: there is no such folder.
        OSError: a folder cannot be read.
        ValueError: it is a file, or there is no image in it.

    Examples:
        >>> from PIL import Image
        >>> Path("photos/cats").mkdir(parents=True)
        >>> for name in ("bus.jpg", "cats/1.png"):
        ...     Image.new("RGB", (8, 8)).save(Path("photos", name))
        >>> [path.as_posix() for path in find_images("photos")]
        ['photos/bus.jpg', 'photos/cats/1.png']
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"images: expected a folder of images, there is no {folder}")
    if not folder.is_dir():
        raise ValueError(f"images: expected a folder of images, got the file {folder}")
    images = below(folder)
    if not images:
        raise ValueError(
            f"images: expected images in {folder}, with names that end in "
            f"{', '.join(IMAGE_SUFFIXES)}; got none"
        )
    return images


def below(folder: Path) -> list[Path]:
    """As `find_images`, but of a folder that is there, and perhaps none."""
    images = []
    for each in walk(folder):
        if not isinstance(each, Unread):
            root, files = each
            names = (name for name in files if not is_hidden(name))
            images += [root / name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
        elif each.fault == "unreadable folder":
            raise OSError(f"images: {each.path} cannot be read: {each.detail}")
    return sorted(images)


@torch.inference_mode()
def encode_images(
    paths: Sequence[Path],
    preprocess: Preprocess,
    encode: Callable[[Tensor], Tensor],
    *,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    workers: int = 0,
    advance: Callable[[int, int], None] = lambda done, unreadable: None,
) -> tuple[Tensor, list[Path], list[ImageFault]]:
    """Features of image files, in their order.

    Args:
        paths: the files.
        preprocess: to float32 [3, size, size], the same size for all.
        encode: [n, 3, size, size] to [n, dim], such as a model's `encode_image`.
        batch_size: images in memory at a time.
        device: where `encode` computes.
        workers: threads that read files; 0 for one per CPU.
        advance: told after each batch how many more files are done, and how many were unreadable
            so far.

    Returns:
        float32 [n, dim], rows of norm 1, on the CPU; the n files that could be read; and the faults
        of the others, each with its file.

    Raises:
        ValueError: none of the files can be read; the message names the first ones.

    Examples:
        >>> import fastvlp
        >>> from PIL import Image
        >>> photos = [Path("bus.jpg")]
        >>> Image.new("RGB", (80, 60), "red").save(photos[0])
        >>> model, preprocess, _ = fastvlp.create("tiny")
        >>> features, kept, faults = encode_images(photos, preprocess, model.encode_image)
        >>> features.shape, len(faults)
        (torch.Size([1, 512]), 0)
    """
    parts, kept, faults = [], [], []

    def read(path: Path) -> Tensor | ImageFault:
        try:
            return preprocess.read(path)
        except ImageFault as fault:
            return fault

    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        for at in range(0, len(paths), batch_size):
            some = paths[at : at + batch_size]
            found = list(zip(some, pool.map(read, some), strict=True))
            rows = [row for _, row in found if isinstance(row, Tensor)]
            kept += [path for path, row in found if isinstance(row, Tensor)]
            faults += [row for _, row in found if isinstance(row, ImageFault)]
            if rows:
                features = encode(torch.stack(rows).to(device)).float()
                parts.append(F.normalize(features, dim=-1).cpu())
            advance(len(some), len(faults))
    if not parts:
        first = "; ".join(map(str, faults[:3])) or "there is none"
        raise ValueError(f"images: expected at least one that can be read: {first}")
    return torch.cat(parts), kept, faults
