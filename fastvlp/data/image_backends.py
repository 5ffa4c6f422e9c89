"""From encoded images to a batch of floats: by DALI and the compiled kernel, or by Pillow.

Both give the same pixels, bit for bit; on a GPU DALI's resize differs from Pillow's a little.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch

from fastvlp import _native
from fastvlp.data.image_check import ImageFault, decode_rgb, open_rgb
from fastvlp.data.image_transforms import (
    canvas,
    into_batch,
    into_batch_by_pillow,
    pixel_mask,
    value_table,
)
from fastvlp.data.optional import require
from fastvlp.data.recipes import Plan, Recipe

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


def choose(
    name: str, recipe: Recipe, batch_size: int, threads: int, device: torch.device
) -> Backend:
    """The backend of this name; "auto" takes DALI where it is and can run, else Pillow.

    Raises:
        ValueError: there is no backend of this name.
        ImportError, RuntimeError: the backend asked for cannot run here; the message says why.
    """
    if name not in ("auto", "dali", "pil"):
        raise ValueError(f"backend: expected 'auto', 'dali' or 'pil'; got {name!r}")
    if name != "pil":
        if reasons := _missing():
            if name == "dali":
                raise reasons
        else:
            # Only now: importing DALI takes a second.
            from fastvlp.data import image_dali

            return image_dali.backend(recipe, batch_size, threads, device)
    return PillowBackend(recipe, threads, device)


def _missing() -> Exception | None:
    if reasons := _native.load():
        return RuntimeError(f"backend 'dali': {'; '.join(reasons)}")
    try:
        require("nvidia.dali", extra="dali")
    except ImportError as error:
        return ImportError(f"backend 'dali': {error}; or use backend='pil', which is slower")
    return None


class Threaded:
    """What the backends on the CPU share: work on parts of a batch, one for each thread."""

    def __init__(self, recipe: Recipe, threads: int, device: torch.device) -> None:
        self._recipe, self._table = recipe, value_table(recipe)
        self._threads, self._device = threads, device
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fastvlp-images")

    def _fill(self, images, plan: Planner, size_of: Callable, fill: Callable):
        plans = [plan(i, *size_of(image)) for i, image in enumerate(images)]
        height, width = canvas(plans)
        if not self._recipe.padded:
            height = width = self._recipe.size
        gpu = self._device.type == "cuda"
        out = torch.empty(len(plans), 3, height, width, pin_memory=gpu)
        # Several parts for each thread: images differ in cost.
        step = max(1, -(-len(plans) // (4 * self._threads)))
        parts = [slice(i, i + step) for i in range(0, len(plans), step)]
        list(self._pool.map(lambda p: fill(images[p], plans[p], self._table, out[p]), parts))
        mask = pixel_mask(plans, height, width).to(self._device) if self._recipe.padded else None
        # From pinned memory, which torch keeps until the copy is done.
        return out.to(self._device, non_blocking=True), mask

    def close(self) -> None:
        self._pool.shutdown()


class PillowBackend(Threaded):
    """Everything by Pillow."""

    name = "pil"

    def decode(self, contents: Sequence[bytes]) -> list[Any]:
        return list(self._pool.map(lambda content: _or_fault(open_rgb, content), contents))

    def batch(self, images, plan: Planner):
        return self._fill(images, plan, lambda image: image.size, into_batch_by_pillow)


class KernelBackend(Threaded):
    """Decoding by Pillow, the rest by the compiled kernel: what DALI's backend builds upon."""

    name = "kernel"

    def decode(self, contents: Sequence[bytes]) -> list[Any]:
        return list(self._pool.map(lambda content: _or_fault(decode_rgb, content), contents))

    def batch(self, images, plan: Planner):
        return self._fill(images, plan, lambda image: (image.shape[1], image.shape[0]), into_batch)


def _or_fault(decode: Callable[[bytes], Any], content: bytes) -> Any:
    try:
        return decode(content)
    except ImageFault as fault:
        return fault
