"""The dropout mask as a function of position: the same on every device and in every pass.

A counter-based generator (Philox 4x32 with 10 rounds; Salmon et al., "Parallel random numbers: as
easy as 1, 2, 3", SC 2011) gives four 32-bit words for each counter. The counter of an attention
weight is (key // 4, query row, head, 0), its word the one numbered key % 4; the key is the seed.
Nothing about masks, tiles or threads enters, so that forward and backward, CPU and GPU agree.
"""

import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF


def threshold(p: float) -> int:
    """Weights whose word is below this are dropped: p of all of them."""
    return int(p * 2.0**32)


def keep_mask(seed: int, rows: torch.Tensor, heads: int, keys: int, p: float) -> torch.Tensor:
    """Which weights stay, bool [heads, len(rows), keys]; `rows` are global query rows (int64)."""
    device = rows.device
    groups = torch.arange(-(-keys // 4), device=device)
    shape = (heads, len(rows), len(groups))
    words = _philox(
        seed,
        [
            groups.expand(shape),
            rows[:, None].expand(shape),
            torch.arange(heads, device=device)[:, None, None].expand(shape),
            torch.zeros(shape, dtype=torch.int64, device=device),
        ],
    )
    return torch.stack(words, -1).flatten(-2)[..., :keys] >= threshold(p)


def _philox(seed: int, counter: list[torch.Tensor]) -> list[torch.Tensor]:
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    c0, c1, c2, c3 = counter
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high2, low2 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return [c0, c1, c2, c3]


def _multiply(a: torch.Tensor, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    # 32 x 32 bits to 64 in signed 64-bit integers: by the halves of `a`.
    low, high = (a & 0xFFFF) * b, (a >> 16) * b
    total = high + (low >> 16)
    return total >> 16, ((total & 0xFFFF) << 16) | (low & 0xFFFF)
