"""``fastvlp ground``: where in an image texts lie, as heat maps over it, by ALBEF's GradCAM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from fastvlp.commands.contact_sheet import Cell, contact_sheet, save_png
from fastvlp.commands.search import trained_model, turned
from fastvlp.data.images.integrity import ImageFault, open_rgb
from fastvlp.data.optional import require
from fastvlp.data.text.base import PaddedText
from fastvlp.factory import Created
from fastvlp.models.albef import Albef
from fastvlp.models.albef.tasks.grounding import grounding_maps
from fastvlp.train import parallel, ranges
from fastvlp.train.config import Device

if TYPE_CHECKING:
    from PIL.Image import Image

# Longest side of an image in the picture, in pixels.
_SIDE = 384
# How much the warmest place of a map hides of the image.
_OPACITY = 0.7


@dataclass(frozen=True)
class Grounded:
    """A text, the probability that it matches the image, and its map, float32 [height, width] on
    the pixels of the upright image, from 0 to 1."""

    text: str
    match: float
    heat: Tensor

    def warmest(self) -> tuple[int, int]:
        """Where the map is highest: column and row of the pixel."""
        row, column = divmod(int(self.heat.argmax()), self.heat.shape[1])
        return column, row


@dataclass
class Ground:
    """Show where in an image texts lie, by the cross-attention of an ALBEF (GradCAM).

    Prints the probability that each text matches the image and the place where its map is highest,
    and writes the image with each map over it as one PNG. Every map is scaled to its own largest
    value: look at the probability as well.
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Folder of a run of `fastvlp train albef`, or a published checkpoint of ALBEF."""

    image: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="IMAGE")]
    """The file of an image."""

    texts: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="TEXT...")]
    """One text or several, words or sentences, each in quotes. A text longer than the model's
    context is cut."""

    output: Annotated[Path, tyro.conf.arg(aliases=("--out",))] = Path("ground.png")
    """PNG file for the maps."""

    layer: int | None = None
    """Whose attention: a fusion layer, counted over text and fusion layers from 0. By default the
    third fusion layer, 8 of the paper's model, or the last of a model with fewer."""

    tokenizer: Path | None = None
    """Vocabulary of the texts. By default that of the run, beside the model, or BERT's."""

    device: Device = "auto"
    """Where to compute."""

    def __post_init__(self) -> None:
        ranges.check(self)

    def run(self) -> list[Grounded]:
        """Compute the maps, print and draw them; they are given in the order of the texts."""
        self._check()
        with parallel.ranks(self.device) as ranks:
            made = trained_model(self.model, ranks.device, self.tokenizer)
            if not isinstance(made.model, Albef):
                raise ValueError(
                    "model: expected an ALBEF, whose words attend to places of the image, "
                    f"got one of {made.model.kind}"
                )
            image = upright(self.image, made)
            found = self._ground(made, image, ranks.device)
        self._say(found)
        save_png(self._sheet(image, found), self.output)
        print(f"the maps are in {self.output}", flush=True)
        return found

    def _check(self) -> None:
        if not self.texts:
            raise ValueError("texts: expected at least one text, got none")
        if empty := [text for text in self.texts if not text.strip()]:
            raise ValueError(f"texts: expected words in each text, got {empty[0]!r}")
        if not self.image.exists():
            raise FileNotFoundError(
                f"image: expected the file of an image, there is no {self.image}"
            )
        if self.image.is_dir():
            raise ValueError(f"image: expected the file of an image, got the folder {self.image}")

    def _ground(self, made: Created, image: Image, device: torch.device) -> list[Grounded]:
        words = tokens(made, self.texts)
        config = made.model.config
        layer = config.text_layers + min(2, config.fusion_layers - 1)
        maps, matches = grounding_maps(
            made.model,
            made.preprocess(image)[None].to(device),
            words.ids,
            words.mask,
            [0] * len(self.texts),
            layer=layer if self.layer is None else self.layer,
            return_match=True,
        )
        heat = enlarge(maps.float().cpu(), image.size)
        return [Grounded(*each) for each in zip(self.texts, matches.tolist(), heat, strict=True)]

    def _say(self, found: list[Grounded]) -> None:
        print(f"{self.image}: probability that the text matches, warmest place, text")
        for each in found:
            column, row = each.warmest()
            print(f"{each.match:7.3f}  x {column:4}, y {row:4}  {each.text}")

    def _sheet(self, image: Image, found: list[Grounded]) -> Image:
        """The image, and beside it each text's map over it, on a contact sheet."""
        shown = image.resize([max(1, round(_SIDE * side / max(image.size))) for side in image.size])
        cells = [Cell(shown, "the image")]
        for each in found:
            heat = enlarge(each.heat[None], shown.size)[0]
            cells.append(Cell(overlay(shown, heat), each.text, [f"matches: {each.match:.3f}"]))
        return contact_sheet(self.image.name, cells, side=_SIDE)


def upright(path: Path, made: Created) -> Image:
    """An image turned as its camera says, converted to RGB as the model has it.

    Raises:
        ValueError: it cannot be read; the message names the file.
    """
    try:
        return open_rgb(path.read_bytes(), lambda image: turned(image, made.preprocess.convert))
    except ImageFault as fault:
        raise ValueError(f"image: {path}: {fault}") from fault


def tokens(made: Created, texts: Sequence[str]) -> PaddedText:
    """Ids [texts, length] and their mask.

    Raises:
        ValueError: a text has no word in it that the tokenizer keeps.
    """
    *padded, empty = made.tokenizer.padded([*texts, ""]).mask.sum(1).tolist()
    for text, length in zip(texts, padded, strict=True):
        if length <= empty:
            raise ValueError(f"texts: expected words in each text, got {text!r}")
    return made.tokenizer.padded(list(texts))


def enlarge(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps [n, rows, columns] on an image of this width and height, float32 [n, height, width].

    Bicubic; each is divided by its largest value, so that it goes from 0 to 1. One that is 0
    everywhere stays so.
    """
    width, height = size
    large = F.interpolate(maps[:, None], size=(height, width), mode="bicubic")[:, 0].clamp(min=0)
    most = large.amax((1, 2), keepdim=True)
    return large / torch.where(most > 0, most, 1)


def overlay(image: Image, heat: Tensor) -> Image:
    """An image with a heat map over it: untouched where the map is 0, red where it is 1.

    Args:
        image: RGB.
        heat: float32 [height, width] of the image, from 0 to 1.
    """
    colours = require("matplotlib").colormaps["turbo"](heat.numpy())[..., :3] * 255
    share = _OPACITY * heat.numpy()[..., None]
    mixed = (1 - share) * np.asarray(image) + share * colours
    return require("PIL.Image").fromarray(mixed.round().astype(np.uint8))


def parse(options: Sequence[str], prog: str = "fastvlp ground") -> Ground:
    """The command that ``options`` spell."""
    return tyro.cli(Ground, args=list(options), prog=prog)
