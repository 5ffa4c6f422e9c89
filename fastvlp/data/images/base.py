"""What the image backends share: their interface, their errors, and threads for a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch

from fastvlp.data.images.conversion import RgbConversion
from fastvlp.data.images.integrity import ImageFault, decode_rgb
from fastvlp.data.images.recipes import Plan, Recipe
from fastvlp.data.images.transforms import canvas, into_batch, pixel_mask, value_table

# Pixels of an image resized as its plan has it, before the window is cut out: 200 MB as 8-bit RGB,
# and sides in a ratio of 1,337 for a centre crop of 224.
MOST_RESIZED = 1 << 26
# Takes an image's place in the batch, width and height.
Planner = Callable[[int, int, int], Plan]


class BrokenImages(Exception):
    """Images that cannot be decoded, by their place in the batch."""

    def __init__(self, faults: dict[int, ImageFault]) -> None:
        super().__init__(faults)
        self.faults = faults


class Backend(Protocol):
    """Two stages, so that one batch is decoded while another is transformed."""

    name: str

    def decode(self, contents: Sequence[bytes]) -> list[Any]:
        """An image for each content, an ``ImageFault`` where there is none."""

    def batch(
        self, images: Sequence[Any], plan: Planner
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Images ``[n, 3, H, W]`` and, for padded recipes, the mask ``[n, H, W]`` of pixels.

        Raises:
            BrokenImages: some turn out to be broken only now.
        """

    def close(self) -> None:
        """Give threads and memory back."""


def plans_of(sizes: Sequence[tuple[int, int]], plan: Planner) -> list[Plan]:
    """The plan of each image of width and height.

    Raises:
        BrokenImages: the sides of some differ so much that resizing them would need more than
            ``MOST_RESIZED`` pixels.
    """
    plans = [plan(i, *size) for i, size in enumerate(sizes)]
    faults = {}
    for i, ((width, height), each) in enumerate(zip(sizes, plans, strict=True)):
        if each.size[0] * each.size[1] > MOST_RESIZED:
            faults[i] = ImageFault(
                f"the image of {width} x {height} pixels would be resized to {each.size[0]} x "
                f"{each.size[1]}, more than {MOST_RESIZED:,} pixels: its sides differ too much"
            )
    if faults:
        raise BrokenImages(faults)
    return plans


class Threaded:
    """What the backends on the CPU share: work on parts of a batch, one for each thread."""

    def __init__(
        self, recipe: Recipe, threads: int, device: torch.device, convert: RgbConversion
    ) -> None:
        self._recipe, self._table, self._convert = recipe, value_table(recipe), convert
        self._threads, self._device = threads, device
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fastvlp-images")

    def _fill(self, images, plan: Planner, size_of: Callable, fill: Callable):
        plans = plans_of([size_of(image) for image in images], plan)
        height, width = canvas(plans, self._recipe)
        gpu = self._device.type == "cuda"
        out = torch.empty(len(plans), 3, height, width, pin_memory=gpu)
        # Several parts for each thread: images differ in cost.
        step = max(1, -(-len(plans) // (4 * self._threads)))
        parts = [slice(i, i + step) for i in range(0, len(plans), step)]
        list(self._pool.map(lambda p: fill(images[p], plans[p], self._table, out[p]), parts))
        mask = pixel_mask(plans, height, width).to(self._device) if self._recipe.padded else None
        # From pinned memory, which torch keeps until the copy is done.
        return out.to(self._device, non_blocking=True), mask

    def _decoded(self, decode: Callable, contents: Sequence[bytes]) -> list[Any]:
        """What ``decode`` makes of each content, or its ``ImageFault``."""

        def one(content: bytes) -> Any:
            try:
                return decode(content, self._convert)
            except ImageFault as fault:
                return fault

        return list(self._pool.map(one, contents))

    def close(self) -> None:
        self._pool.shutdown()


class KernelBackend(Threaded):
    """Decoding by Pillow, the rest by the compiled kernel: what DALI's backend builds upon."""

    name = "kernel"

    def decode(self, contents: Sequence[bytes]) -> list[Any]:
        return self._decoded(decode_rgb, contents)

    def batch(self, images, plan: Planner):
        return self._fill(images, plan, lambda image: (image.shape[1], image.shape[0]), into_batch)
