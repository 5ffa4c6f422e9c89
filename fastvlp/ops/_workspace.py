"""One large buffer kept between calls, so that a training step does not fault it in anew.

The logits kept for backward are the largest thing an operator allocates. Fresh memory of that size
costs more time than the product that fills it; a trainer needs it again at the next step, at the
very moment when its memory peaks anyway.
"""

import threading

import torch

_lock = threading.Lock()
_free: list[torch.Tensor] = []  # at most one, the largest


class Lease:
    """`n` floats for one forward pass, until `give_back` or until nobody holds the lease."""

    def __init__(self, n: int):
        with _lock:
            found = _free.pop() if _free and _free[0].numel() >= n else None
        self._whole = torch.empty(n, dtype=torch.float32) if found is None else found
        self.floats: torch.Tensor | None = self._whole[:n]

    def give_back(self) -> None:
        """Lets the next forward pass have the buffer; `floats` is None from now on."""
        if self.floats is None:
            return
        self.floats = None
        with _lock:
            if not _free or _free[0].numel() < self._whole.numel():
                _free[:] = [self._whole]
        del self._whole

    def __del__(self):
        self.give_back()


def release_workspace() -> None:
    """Frees the memory that operators keep between calls (up to their `workspace_bytes`)."""
    with _lock:
        _free.clear()
    if hasattr(torch.ops.fastvlp, "release_cpu_buffers"):
        torch.ops.fastvlp.release_cpu_buffers()
