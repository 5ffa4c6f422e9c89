"""The contact sheet: where images and texts stand, and what has no room."""

import numpy as np
import pytest
from PIL import Image

from fastvlp.commands.contact_sheet import Cell, contact_sheet


def pixels(sheet):
    return np.asarray(sheet.convert("RGB"))


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (4, 4, 1), (5, 4, 2)])
def test_the_grid_has_a_place_for_each_image(count, columns, rows):
    colours = ["red", "lime", "blue", "yellow", "cyan"][:count]
    cells = [Cell(Image.new("RGB", (300, 200), c), "0.5", ["x.jpg"]) for c in colours]
    sheet = contact_sheet("colours", cells)
    assert sheet.width == 12 + columns * 236
    found = {tuple(colour) for _, colour in sheet.getcolors(1 << 24)}
    for cell in cells:
        assert cell.image.getpixel((0, 0)) in found
    middle = pixels(sheet)[sheet.height // rows // 2, 12 + 112]
    assert tuple(middle) == (255, 0, 0)


def test_a_long_caption_stays_below_its_own_image():
    white = Image.new("RGB", (224, 224), "white")
    sheet = contact_sheet("h", [Cell(white, "word " * 40, ["x" * 300]), Cell(white, "")])
    assert pixels(sheet)[:, 12 + 224 + 6 :][60:].min() == 255  # nothing beside the first one
    assert pixels(sheet)[250:, : 12 + 224].min() < 100


def test_the_example_stands_beside_the_heading():
    cell = Cell(Image.new("RGB", (20, 20), "red"), "1")
    cells = [cell, cell]
    with_example = contact_sheet("like this", cells, Image.new("RGB", (50, 50), "blue"))
    assert (0, 0, 255) in {colour for _, colour in with_example.getcolors(1 << 24)}
    assert with_example.height > contact_sheet("like this", cells).height
