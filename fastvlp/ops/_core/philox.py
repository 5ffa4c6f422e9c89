"""Random words as a function of seed and counter: the same on every device and in any order.

Philox 4x32 with 10 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
"""

import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF


def philox(seed: torch.Tensor | int, counter: list[torch.Tensor]) -> list[torch.Tensor]:
    """The four words, each an int64 tensor of values below 2^32, of every counter.

    `counter` holds four int64 tensors of values below 2^32 that broadcast.
    """
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


def gumbel(words: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Standard Gumbel variables from random words: -log(-log(1 - v)) with v in (0, 1)."""
    v = (words.to(dtype) + 0.5) * 2.0**-32
    return -(-(-v.clamp(max=1 - 2.0**-24)).log1p()).log()
