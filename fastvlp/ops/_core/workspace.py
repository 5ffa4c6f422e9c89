"""One large buffer kept between calls, so that a training step does not fault it in anew.

The logits kept for backward are the largest thing an operator allocates. Fresh memory of that size
costs more time than the matmul that fills it; a trainer needs it again at the next step, at the
very moment when its memory peaks anyway.
"""

from collections import deque

import torch

from .. import compiled

# At most one, the largest. There is no lock: garbage collection and signal handlers call
# `release` at any point of any thread, also inside of these functions. Each step on the deque is
# atomic, and two at the same time lose a buffer at worst, which is then freed.
_free: deque[torch.Tensor] = deque(maxlen=1)


class Workspace:
    """`n` floats for one forward pass, until `release` or until nobody holds the workspace."""

    floats: torch.Tensor | None = None

    def __init__(self, n: int):
        found = _take()
        if found is not None and found.numel() < n:
            _keep(found)
            found = None
        self._whole = torch.empty(n, dtype=torch.float32) if found is None else found
        self.floats = self._whole if self._whole.numel() == n else self._whole[:n]

    def release(self) -> None:
        """Lets the next forward pass have the buffer; `floats` is None from now on."""
        whole, self.floats = self.__dict__.pop("_whole", None), None
        if whole is not None:
            _keep(whole)

    def __del__(self):
        self.release()


def release_workspace() -> None:
    """Frees the memory that operators keep between calls (up to their `workspace_bytes`)."""
    _free.clear()
    if not compiled.load():
        torch.ops.fastvlp.release_cpu_buffers()


def _take() -> torch.Tensor | None:
    try:
        return _free.pop()
    except IndexError:
        return None


def _keep(buffer: torch.Tensor) -> None:
    other = _take()
    _free.append(buffer if other is None or other.numel() <= buffer.numel() else other)
