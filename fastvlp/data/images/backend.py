"""From encoded images to a batch of floats: by DALI and the compiled kernel, or by Pillow.

Both give the same pixels, bit for bit; on a GPU DALI's resize differs from Pillow's a little.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastvlp.data.images.base import Backend, Planner, Threaded
from fastvlp.data.images.conversion import RgbConversion
from fastvlp.data.images.integrity import open_rgb
from fastvlp.data.images.recipes import Recipe
from fastvlp.data.images.transforms import into_batch_by_pillow
from fastvlp.data.optional import require
from fastvlp.ops import compiled


def choose(
    name: str,
    recipe: Recipe,
    batch_size: int,
    threads: int,
    device: torch.device,
    convert: RgbConversion,
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
            from fastvlp.data.images import dali as image_dali

            return image_dali.backend(recipe, batch_size, threads, device, convert)
    return PillowBackend(recipe, threads, device, convert)


def _missing() -> Exception | None:
    if reasons := compiled.load():
        return RuntimeError(f"backend 'dali': {'; '.join(reasons)}")
    try:
        require("nvidia.dali", extra="dali")
    except ImportError as error:
        return ImportError(f"backend 'dali': {error}; or use backend='pil', which is slower")
    return None


class PillowBackend(Threaded):
    """Everything by Pillow."""

    name = "pil"

    def decode(self, contents: Sequence[bytes]) -> list[Any]:
        return self._decoded(open_rgb, contents)

    def batch(self, images, plan: Planner):
        return self._fill(images, plan, lambda image: image.size, into_batch_by_pillow)
