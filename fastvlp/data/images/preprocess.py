"""One image to a model's input, as evaluation has it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastvlp.data.images.base import BrokenImages, plans_of
from fastvlp.data.images.conversion import RgbConversion
from fastvlp.data.images.integrity import ImageFault, open_rgb
from fastvlp.data.images.recipes import Recipe
from fastvlp.data.images.transforms import into_batch_by_pillow, value_table

if TYPE_CHECKING:
    from PIL.Image import Image


class Preprocess:
    """Images to the input of a model: resized, cropped and normalised as its recipe says.

    The pixels are those of ``fastvlp.data.Loader`` with the same recipe, bit for bit.

    Args:
        recipe: one for evaluation, see ``fastvlp.data.images.recipes``.
        convert: how images of other modes become 8-bit RGB.

    Examples:
        >>> from PIL import Image
        >>> from fastvlp.data.images.recipes import CentreCrop
        >>> preprocess = Preprocess(CentreCrop(size=64))
        >>> preprocess(Image.new("RGB", (120, 80))).shape
        torch.Size([3, 64, 64])
    """

    def __init__(self, recipe: Recipe, convert: RgbConversion = RgbConversion()) -> None:
        if recipe.training:
            raise ValueError(f"recipe: expected one for evaluation, got {type(recipe).__name__}")
        self.recipe, self.convert = recipe, convert
        self._table = value_table(recipe)

    def __call__(self, image: Image) -> Tensor:
        """A Pillow image of any mode to float32 [3, height, width].

        Raises:
            TypeError: it is no Pillow image.
            ImageFault: its sides differ too much to be resized.
        """
        if not hasattr(image, "getbands"):
            raise TypeError(
                f"image: expected a Pillow image, got {type(image).__name__}; "
                f"preprocess.read(path) reads a file"
            )
        return self._transformed(self.convert(image))

    def read(self, path: str | os.PathLike[str]) -> Tensor:
        """The image in a file, float32 [3, height, width].

        Raises:
            ImageFault: the file cannot be read or decoded, or its sides differ too much; the
                message names the file.
        """
        try:
            return self._transformed(open_rgb(Path(path).read_bytes(), self.convert))
        except OSError as error:  # a link to nothing, or a file that may not be read
            raise ImageFault(f"{path}: {error.strerror or error}") from error
        except ImageFault as fault:
            raise ImageFault(f"{path}: {fault}") from fault

    def _transformed(self, image: Image) -> Tensor:
        try:
            plans = plans_of([image.size], lambda _, width, height: self._plan(width, height))
        except BrokenImages as broken:
            raise broken.faults[0] from broken
        _, _, width, height = plans[0].window
        out = torch.empty(1, 3, height, width)
        into_batch_by_pillow([image], plans, self._table, out)
        return out[0]

    def _plan(self, width: int, height: int):
        return self.recipe.plan(width, height, ())
