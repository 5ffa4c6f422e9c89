"""A contact sheet: images in a grid, each with lines of text below it, as one Pillow image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastvlp.data.optional import require
from fastvlp.data.shards.write import atomic_file

if TYPE_CHECKING:
    from PIL.Image import Image

_SIDE, _GAP, _COLUMNS = 224, 12, 4
_SIZE, _LINE = 15, 19
_INK, _FAINT = (20, 20, 20), (110, 110, 110)


@dataclass(frozen=True)
class Cell:
    """An image, a line about it, and fainter lines below."""

    image: Image
    title: str
    lines: Sequence[str] = ()


def contact_sheet(
    heading: str,
    cells: Sequence[Cell],
    example: Image | None = None,
    columns: int = _COLUMNS,
    side: int = _SIDE,
) -> Image:
    """The images in a grid below a heading, beside which an example may stand.

    Texts are cut to the width of their image, the heading to that of the sheet. `side` is the
    longest that an image is shown with, in pixels.

    Examples:
        >>> from PIL import Image
        >>> sheet = contact_sheet("red", [Cell(Image.new("RGB", (30, 20), "red"), "0.9")])
        >>> sheet.width > 30 and sheet.height > 20
        True
    """
    pil, drawing = require("PIL.Image"), require("PIL.ImageDraw")
    font, large = _fonts()
    columns = max(1, min(columns, len(cells)))
    text = _LINE * (1 + max((len(cell.lines) for cell in cells), default=0))
    top = _GAP + (side if example is not None else _LINE + 6) + _GAP
    rows = -(-len(cells) // columns)
    width = _GAP + columns * (side + _GAP)
    sheet = pil.new("RGB", (width, top + rows * (side + text + 2 * _GAP)), "white")
    draw = drawing.Draw(sheet)
    left = _GAP
    if example is not None:
        _paste(sheet, example, _GAP, _GAP, side)
        left += side + _GAP
    room = width - left - _GAP
    if room > 0:
        draw.text((left, _GAP), _cut(draw, heading, room, large), _INK, large)
    for number, cell in enumerate(cells):
        row, column = divmod(number, columns)
        x = _GAP + column * (side + _GAP)
        y = top + row * (side + text + 2 * _GAP)
        _paste(sheet, cell.image, x, y, side)
        for place, line in enumerate((cell.title, *cell.lines)):
            ink = _FAINT if place else _INK
            shown = _cut(draw, line, side, font)
            draw.text((x, y + side + 4 + place * _LINE), shown, ink, font)
    return sheet


def save_png(image: Image, path: Path) -> None:
    """Write an image whole or not at all; its folder is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        image.save(file, format="PNG")


def _fonts():
    fonts = require("PIL.ImageFont")
    return fonts.load_default(_SIZE), fonts.load_default(_SIZE + 4)


def _paste(sheet: Image, image: Image, x: int, y: int, side: int) -> None:
    """An image in the middle of its square, smaller where it is larger than that."""
    small = image.copy()
    small.thumbnail((side, side))
    sheet.paste(small, (x + (side - small.width) // 2, y + (side - small.height) // 2))


def _cut(draw, text: str, room: int, font) -> str:
    """A text in one line, its end replaced by dots where it has no room."""
    text = " ".join(text.split())
    if draw.textlength(text, font) <= room:
        return text
    while text and draw.textlength(f"{text}…", font) > room:
        text = text[:-1]
    return f"{text}…"
