"""Position embeddings for another number of positions."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor


def resize_grid_positions(
    positions: Tensor,
    grid: tuple[int, int],
    *,
    prefix: int = 1,
    mode: str = "bicubic",
    antialias: bool = True,
) -> Tensor:
    """Image positions [.., prefix + n², width] for a grid of other sides; unchanged if it fits.

    The first `prefix` rows, of class tokens, are kept. open_clip resizes bicubic with antialias,
    ALBEF bicubic without, ViLT bilinear with ``align_corners``.

    Raises:
        ValueError: the positions beside the prefix are not those of a square.
    """
    count, width = positions.shape[-2] - prefix, positions.shape[-1]
    side = math.isqrt(max(count, 0))
    if side * side != count or not side:
        raise ValueError(
            f"positions: expected {prefix} and a square number of rows, got {positions.shape[-2]}"
        )
    if (side, side) == tuple(grid):
        return positions
    lead = positions.shape[:-2]
    flat = positions.reshape(-1, prefix + count, width)
    square = flat[:, prefix:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    corners = {"align_corners": mode != "bicubic"} if not antialias else {"antialias": True}
    resized = F.interpolate(square, size=tuple(grid), mode=mode, **corners)
    resized = resized.permute(0, 2, 3, 1).flatten(1, 2).to(positions.dtype)
    whole = F.pad(resized, (0, 0, prefix, 0))
    whole[:, :prefix] = flat[:, :prefix]
    return whole.reshape(*lead, -1, width)


def resize_text_positions(positions: Tensor, length: int) -> Tensor:
    """Text positions [n, width] for another length, by linear interpolation, as open_clip."""
    if positions.shape[0] == length:
        return positions
    stretched = F.interpolate(
        positions.float().T[None], size=length, mode="linear", align_corners=False
    )
    return stretched[0].T.to(positions.dtype)
