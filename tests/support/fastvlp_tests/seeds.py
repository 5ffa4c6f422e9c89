"""Other draws of the inputs that tests make from fixed seeds.

The offset stands in an environment variable as well, and a process that a test starts and that
draws inputs calls `inherit` before anything else, before it imports a test module in particular:
then its draws are those of the process that started it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import numpy as np
import torch

VARIABLE = "FASTVLP_TEST_SEED_OFFSET"
_inherited = ExitStack()


def inherit() -> None:
    """Shifts the seeds of this process, to its end, as those of the one that started it are."""
    _inherited.enter_context(_added(int(os.environ.get(VARIABLE, 0))))


@contextmanager
def shifted(offset: int) -> Iterator[None]:
    """Adds `offset` to every seed that torch and NumPy's generators are given while it lasts.

    May be nested; offsets add up. With 0 nothing changes. Processes started in the meantime can
    `inherit` it.
    """
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = str(int(before or 0) + offset)
    try:
        with _added(offset):
            yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


@contextmanager
def _added(offset: int) -> Iterator[None]:
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
