"""Other draws of the inputs that tests make from fixed seeds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch


@contextmanager
def shifted(offset: int) -> Iterator[None]:
    """Adds `offset` to every seed that torch and NumPy's generators are given while it lasts.

    May be nested; offsets add up. With 0 nothing changes.
    """
    if not offset:
        yield
        return
    manual_seed, default_rng, base = torch.manual_seed, np.random.default_rng, torch.Generator

    class Generator(base):
        def manual_seed(self, seed: int) -> torch.Generator:
            return super().manual_seed(seed + offset)

    def seeded_rng(seed: object = None) -> np.random.Generator:
        return default_rng(seed + offset if isinstance(seed, int) else seed)

    with (
        mock.patch.object(torch, "manual_seed", lambda seed: manual_seed(seed + offset)),
        mock.patch.object(torch, "Generator", Generator),
        mock.patch.object(np.random, "default_rng", seeded_rng),
    ):
        yield
