"""Gradients of features and scale from those of the logits, a chunk of rows at a time."""

import torch

from .._core.launch import float32_matmul


class GradientSums:
    """dX [M, D] and dY [N, D] in the input's dtype and dscale [] in fp32, of z = scale * X @ Y.T.

    dX = scale * dz @ Y, dY = scale * dz.T @ X: two vendor GEMMs for each chunk. dscale is the sum
    of dz times the similarities, which the kernels take a tile at a time before they round dz:
    rounded entries that are equal would all be off alike. `unit` is what the chunks of dz were
    divided by, for the range of half precision; it returns here, in fp32, after the GEMMs. dscale
    comes with dX.
    """

    def __init__(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        scale: torch.Tensor,
        unit: torch.Tensor | float,
        need_x: bool = True,
        need_y: bool = True,
    ):
        self._x, self._y, self._unit, self._need_y = x, y, unit, need_y
        self._factor = scale.reshape(()) * unit
        self._dx, self._dy = None, None
        if need_x:
            self._dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            self._dscale = torch.zeros((), dtype=torch.float64, device=x.device)

    def add(self, first: int, dz: torch.Tensor, scale_terms: torch.Tensor) -> None:
        """Take dz / unit [rows, N] of the rows from `first` on, and the tiles' terms of dscale."""
        dz = dz.to(self._x.dtype)
        rows = slice(first, first + len(dz))
        if self._dx is not None:
            part = float32_matmul(dz, self._y)
            self._dscale += scale_terms.sum(dtype=torch.float64)
            torch.mul(part, self._factor, out=self._dx[rows])
        if self._need_y:
            self._dy = float32_matmul(dz.T, self._x[rows], self._dy)

    def results(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """(dX, dY, dscale), None for what is not needed, once every row was added."""
        dy = None if self._dy is None else self._dy.mul_(self._factor).to(self._y.dtype)
        if self._dx is None:
            return None, dy, None
        return self._dx, dy, (self._dscale * self._unit).float()
