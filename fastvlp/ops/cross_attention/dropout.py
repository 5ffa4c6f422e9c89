"""The dropout mask as a function of position: the same on every device and in every pass.

The generator of `_philox` gives four words for each counter. The counter of an attention
weight is (key // 4, query row, head, 0), its word the one numbered key % 4; the key is the seed.
Nothing about masks, tiles or threads enters, so that forward and backward, CPU and GPU agree.
"""

import torch

from .._core.philox import philox


def threshold(p: float) -> int:
    """Weights whose word is below this are dropped: p of all of them."""
    return int(p * 2.0**32)


def keep_mask(seed: int, rows: torch.Tensor, heads: int, keys: int, p: float) -> torch.Tensor:
    """Which weights stay, bool [heads, len(rows), keys]; `rows` are global query rows (int64)."""
    device = rows.device
    groups = torch.arange(-(-keys // 4), device=device)
    shape = (heads, len(rows), len(groups))
    words = philox(
        seed,
        [
            groups.expand(shape),
            rows[:, None].expand(shape),
            torch.arange(heads, device=device)[:, None, None].expand(shape),
            torch.zeros(shape, dtype=torch.int64, device=device),
        ],
    )
    return torch.stack(words, -1).flatten(-2)[..., :keys] >= threshold(p)
