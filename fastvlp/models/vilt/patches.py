"""The patches of images of different sizes: which exist, which are kept, where they lie.

ViLT pads the images of a batch to one canvas (Kim, Son, Kim, arXiv 2102.03334, section 3.1 and
4.2). Here each image says which part of the canvas is its own. A patch counts where its top left
pixel does, and the position of patch (r, c) of an image of h x w patches is read from the model's
square of positions at (r (s - 1) / (h - 1), c (s - 1) / (w - 1)), bilinearly: what the original's
bilinear resize with align_corners gives, for all images at once and only where it is used.

Everything follows from counts that are on the host (`PatchGrid.counts`). From sizes in a list or
on the CPU nothing waits for a GPU; a pixel mask on a GPU is read back once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastvlp.ops.packing.rows import to_device
from fastvlp.ops.rng import philox

# Patches that are no part of an image come after all others; random keys are below 2^32.
LAST = 1 << 32
# The random key of a patch must not depend on the canvas, that is on the other images.
MOST_COLUMNS = 1 << 16


def nonzero_pixels(images: Tensor) -> Tensor:
    """The pixel mask that the original ViLT derives: bool [n, H, W], pixels whose channels do not
    add up to zero.

    It takes a real pixel of that sum for padding, so that an image may lose patches or have the
    wrong size; it is here to compute what the original did, not for use.
    """
    return images.sum(1) != 0


class ImageBatch(NamedTuple):
    """Images on one canvas, and what is theirs of it: the arguments of `Vilt.embed_images`.

    Attributes:
        images: [n, 3, H, W], normalised; sides are multiples of the patch size.
        pixel_mask: [n, H, W], true or nonzero at the images' own pixels. The first column and the
            first row say how high and wide an image is.
        sizes: instead, [n, 2], height and width of each image in patches, at the top left.
            Neither: the images fill the canvas.
        sample_index: [n], numbers that the random subsets of patches depend on; None for the
            places in the batch.
    """

    images: Tensor
    pixel_mask: Tensor | None = None
    sizes: Sequence[tuple[int, int]] | Tensor | None = None
    sample_index: Sequence[int] | Tensor | None = None

    def take(self, index: Tensor) -> ImageBatch:
        """Some of the images; `index` is on the host."""
        there = to_device(index, self.images.device)
        mask = None if self.pixel_mask is None else self.pixel_mask[there]
        sizes, numbers = self.sizes, self.sample_index
        numbers = torch.arange(len(self.images)) if numbers is None else torch.as_tensor(numbers)
        return ImageBatch(
            self.images[there],
            mask,
            None if sizes is None else torch.as_tensor(sizes)[index],
            numbers[index],
        )


@dataclass(frozen=True, eq=False)
class PatchGrid:
    """Which patches of a canvas belong to the images.

    Attributes:
        valid: bool [n, rows, columns], on the images' device.
        heights, widths: int64 [n], the image's size in patches; same device.
        counts: valid patches of each image, on the host.
    """

    valid: Tensor
    heights: Tensor
    widths: Tensor
    counts: tuple[int, ...]

    @classmethod
    def make(cls, batch: ImageBatch, patch: int) -> PatchGrid:
        """The grid of images cut into patches of `patch` pixels on a side.

        Raises:
            TypeError, ValueError: a field is not as described, or an image has no patch.
        """
        images, pixel_mask, sizes, _ = batch
        _check_images(images, patch)
        n, rows, columns = len(images), images.shape[2] // patch, images.shape[3] // patch
        if pixel_mask is not None and sizes is not None:
            raise ValueError("sizes: expected None beside a pixel_mask")
        if pixel_mask is not None:
            return cls._from_mask(pixel_mask, images, patch)
        if sizes is None:
            sizes = torch.tensor([rows, columns]).expand(n, 2)
        sizes = torch.as_tensor(sizes).cpu().long() if n else torch.zeros(0, 2, dtype=torch.int64)
        if sizes.shape != (n, 2):
            raise ValueError(f"sizes: expected [{n}, 2], got {list(sizes.shape)}")
        if n and (sizes.min() < 1 or (sizes > torch.tensor([rows, columns])).any()):
            raise ValueError(
                f"sizes: expected 1 to ({rows}, {columns}), the patches of the canvas, "
                f"got {sizes.tolist()}"
            )
        counts = tuple(sizes.prod(1).tolist())
        heights, widths = to_device(sizes.T.contiguous(), images.device)
        valid = (torch.arange(rows, device=images.device)[:, None] < heights[:, None, None]) & (
            torch.arange(columns, device=images.device) < widths[:, None, None]
        )
        return cls(valid, heights, widths, counts)

    @classmethod
    def _from_mask(cls, mask: Tensor, images: Tensor, patch: int) -> PatchGrid:
        if mask.shape != (len(images), *images.shape[2:]):
            expected = [len(images), *images.shape[2:]]
            raise ValueError(f"pixel_mask: expected {expected}, got {list(mask.shape)}")
        valid = mask[:, ::patch, ::patch].to(images.device).bool()
        counts = tuple(valid.sum((1, 2)).tolist())
        if 0 in counts:
            raise ValueError(f"pixel_mask: image {counts.index(0)} has no patch")
        return cls(valid, valid[:, :, 0].sum(1), valid[:, 0].sum(1), counts)


def _check_images(images: Tensor, patch: int) -> None:
    if not images.is_floating_point():
        raise TypeError(f"images: expected floating point (normalised pixels), got {images.dtype}")
    if images.dim() != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        raise ValueError(f"images: expected [n, 3, height, width], got {list(images.shape)}")
    if images.shape[2] % patch or images.shape[3] % patch:
        raise ValueError(
            f"images: expected sides that are multiples of the patch size {patch}, got "
            f"{list(images.shape[2:])}; pad with pixels outside of the mask"
        )


@dataclass(frozen=True, eq=False)
class Selection:
    """The patches that the model sees.

    Attributes:
        order: int64 [n, rows * columns], each image's patches in the canvas, kept ones first.
        counts: how many of them are kept, on the host.
    """

    grid: PatchGrid
    order: Tensor
    counts: tuple[int, ...]

    def packed(self) -> tuple[Tensor, Tensor]:
        """Image and place in the canvas of all kept patches, one image after another."""
        counts = torch.tensor(self.counts, dtype=torch.int64)
        image = torch.arange(len(counts)).repeat_interleave(counts)
        rank = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts)[image]
        image, rank = to_device(torch.stack([image, rank]), self.order.device)
        return image, self.order[image, rank]

    def padded(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same for [n, most kept], the third tensor False at what is no kept patch."""
        most = max(self.counts, default=0)
        place = self.order[:, :most]
        image = torch.arange(len(place), device=place.device)[:, None].expand_as(place)
        counts = to_device(torch.tensor(self.counts, dtype=torch.int64), place.device)
        return image, place, torch.arange(most, device=place.device) < counts[:, None]


def select(
    grid: PatchGrid,
    max_image_len: int | None = None,
    seed: int | None = None,
    sample_index: Sequence[int] | Tensor | None = None,
) -> Selection:
    """All patches, or a random subset of those of images that have more than `max_image_len`.

    Args:
        max_image_len: None or -1 keeps all.
        seed: the subset, without replacement, is a function of it and of `sample_index`, not of
            the batch; None draws a seed from torch's generator of the CPU.
        sample_index: [n], a number for each image; None for its place in the batch.
    """
    valid = grid.valid.flatten(1)
    key = torch.where(valid, 0, LAST)
    counts = grid.counts
    if max_image_len is not None and max_image_len != -1:
        if max_image_len < 1:
            raise ValueError(f"max_image_len: expected at least 1, or -1, got {max_image_len}")
        counts = tuple(min(count, max_image_len) for count in counts)
    if counts != grid.counts:
        long = to_device(torch.tensor(counts) < torch.tensor(grid.counts), valid.device)
        random = _random_keys(grid.valid, seed, sample_index)
        key = torch.where(valid & long[:, None], random, key)
    return Selection(grid, key.argsort(dim=1, stable=True), counts)


def _random_keys(valid: Tensor, seed: int | None, sample_index) -> Tensor:
    n, rows, columns = valid.shape
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    if sample_index is None:
        sample_index = torch.arange(n)
    index = torch.as_tensor(sample_index)
    if index.shape != (n,) or index.is_floating_point():
        raise ValueError(f"sample_index: expected {n} whole numbers, got {list(index.shape)}")
    index = to_device(index, valid.device) if index.device != valid.device else index
    index = index.long()[:, None, None]
    place = torch.arange(rows, device=valid.device)[:, None] * MOST_COLUMNS
    place = (place + torch.arange(columns, device=valid.device)).expand(n, -1, -1)
    zero = torch.zeros_like(place)
    words = philox(seed, [place, index & 0xFFFFFFFF, (index >> 32) & 0xFFFFFFFF, zero])
    return words[0].flatten(1)


def position_weights(
    grid: PatchGrid, image: Tensor, place: Tensor, side: int, dtype: torch.dtype
) -> Tensor:
    """[.., side²]: how much of each of the model's positions a patch's position takes.

    Args:
        image, place: [..] int64, the patch's image and its place in the canvas.
        side: of the model's square of positions.
        dtype: of the weights, float32 or float64.

    Outside of the image's height and width the weights are zero, as in the original.
    """
    columns = grid.valid.shape[2]
    row, column = place // columns, place % columns
    heights, widths = grid.heights[image], grid.widths[image]
    y = _interpolation(row.to(dtype), heights, side)
    x = _interpolation(column.to(dtype), widths, side)
    inside = ((row < heights) & (column < widths))[..., None, None]
    return (y[..., :, None] * x[..., None, :] * inside).flatten(-2)


def _interpolation(index: Tensor, size: Tensor, side: int) -> Tensor:
    """[.., side], the weights of linear interpolation at index (side - 1) / (size - 1)."""
    scale = (side - 1) / (size - 1).clamp(min=1).to(index.dtype)
    at = torch.where(size > 1, index * scale, 0.0)[..., None]
    return (1 - (at - torch.arange(side, device=at.device)).abs()).clamp(min=0)
