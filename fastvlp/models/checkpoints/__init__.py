"""Published checkpoints into fastvlp's models: reading, renaming, resizing and reporting."""

from ._files import read_state_dict
from ._positions import resize_grid_positions, resize_text_positions
from ._report import LoadReport, apply
from .any import load_any
from .clip import load_clip
from .export import export_clip
from .vilt import initialise_from_vit, load_vilt

__all__ = [
    "LoadReport",
    "apply",
    "export_clip",
    "load_any",
    "load_clip",
    "initialise_from_vit",
    "load_vilt",
    "read_state_dict",
    "resize_grid_positions",
    "resize_text_positions",
]
