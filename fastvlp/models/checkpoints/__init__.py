"""Published checkpoints into fastvlp's models: reading, renaming, resizing and reporting."""

from ._files import read_state_dict
from ._positions import resize_grid_positions, resize_text_positions
from ._report import LoadReport, apply

__all__ = [
    "LoadReport",
    "apply",
    "read_state_dict",
    "resize_grid_positions",
    "resize_text_positions",
]
