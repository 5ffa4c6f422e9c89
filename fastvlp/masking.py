"""Choosing the tokens of masked language modelling, as a function of the ids and of explicit keys.

    masked ids, labels = mask_tokens(ids, vocabulary, keys, rate=.15, whole_word=...)

A chosen token is a label: 80 % of the chosen become the mask token, 10 % a token drawn from the
whole vocabulary, 10 % stay. Elsewhere the label is -100. Each token's fate is drawn on its own.

    subword      every token but PAD and CLS is chosen with probability `rate`, independently
                 (ALBEF, arXiv 2107.07651, section 3.2; BERT, arXiv 1810.04805, appendix A.1)
    whole word   words (a piece and the continuations, "##", after it) are taken in random order
                 until the budget of max(1, round(rate * length)) tokens is spent, round half to
                 even; a word larger than what is left is passed over. CLS and SEP belong to no
                 word. (ViLT, arXiv 2102.03334, section 3.3)
    budget       "real": the length is that of the text, CLS and SEP included, PAD not.
                 "padded": the length is that of the row, and each PAD is a word that can use up
                 budget but is never a label. This is what ViLT's published recipe does; short
                 texts get few labels or none.

Randomness: a counter-based generator (the output function of SplitMix64: Steele et al. 2014) over
(key, position), in integer arithmetic, so the result is the same on every device, for every batch
size and order, and depends on nothing but a row's own ids, key and, with "padded", length.

Shapes: ids int32 or int64 [n, length], keys int64 [n] -> ids of the same dtype, int64 labels.
Nothing is differentiable. Cost: a few passes over n x length integers; whole words take one pass
for each token of the budget of a row without padding. Never waits for a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from numbers import Real
from typing import Literal

import torch

from fastvlp.splitmix import GOLDEN, mix, shift, signed

IGNORED = -100
_LAST = torch.iinfo(torch.int64).max
# One independent stream of random numbers for each question asked about a token.
_CHOICE, _FATE, _TOKEN = range(3)


@dataclass(frozen=True, eq=False)
class MaskingVocabulary:
    """What masking must know of a vocabulary.

    Attributes:
        size: number of ids, from which random tokens are drawn.
        mask_id, pad_id, cls_id: ids of [MASK], [PAD] and [CLS].
        sep_id: id of [SEP], None where texts do not end in one.
        continuation: bool [size], true for the pieces that continue a word ("##ing"). On the
            device of the ids; only whole-word masking reads it.
    """

    size: int
    mask_id: int
    pad_id: int
    cls_id: int
    sep_id: int | None
    continuation: torch.Tensor

    def to(self, device: torch.device | str) -> MaskingVocabulary:
        """The same with its table on ``device``."""
        return replace(self, continuation=self.continuation.to(device))


def sample_keys(seed: int, indices: torch.Tensor) -> torch.Tensor:
    """One well-mixed int64 key for each sample index, different for every seed.

    Args:
        seed: any integer; of a run, or of a run and an epoch.
        indices: integers, any shape: numbers that tell the samples apart.
    """
    # Filled on the device: a copy from the host would wait for it.
    number = torch.full((), signed(seed), dtype=torch.int64, device=indices.device)
    mixed_seed = mix(number + GOLDEN)
    return mix(mixed_seed + GOLDEN * (indices.long() + 1))


def mask_tokens(
    ids: torch.Tensor,
    vocabulary: MaskingVocabulary,
    keys: torch.Tensor,
    *,
    rate: float = 0.15,
    whole_word: bool = False,
    budget: Literal["real", "padded"] = "real",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masked ids and labels for rows of ids; the module's docstring has the rules.

    Args:
        ids: [n, length], padded at the end.
        vocabulary: of the tokenizer that made them.
        keys: int64 [n], one for each row, from ``sample_keys``.
        rate: share of tokens to choose.
        whole_word: choose words, not pieces.
        budget: for whole words, the length that the rate refers to.

    Raises:
        TypeError, ValueError: an argument has another shape, dtype, device or value. (Ids on a
            GPU are not looked at.)

    Examples:
        >>> import torch
        >>> from fastvlp.masking import MaskingVocabulary, mask_tokens, sample_keys
        >>> pieces = torch.zeros(1000, dtype=torch.bool)
        >>> vocabulary = MaskingVocabulary(1000, 3, 0, 1, sep_id=2, continuation=pieces)
        >>> ids, keys = torch.randint(10, 1000, (2, 12)), sample_keys(0, torch.arange(2))
        >>> masked, labels = mask_tokens(ids, vocabulary, keys, rate=0.5)
        >>> torch.equal(masked[labels == -100], ids[labels == -100])
        True
    """
    _check(ids, vocabulary, keys, rate, budget)
    positions = torch.arange(ids.shape[1], device=ids.device)
    if whole_word:
        chosen = _choose_words(ids, vocabulary, keys, positions, rate, budget == "padded")
    else:
        candidates = (ids != vocabulary.pad_id) & (ids != vocabulary.cls_id)
        chosen = candidates & _happens(_draw(keys, positions, _CHOICE), 0.0, rate)
    fate = _draw(keys, positions, _FATE)
    masked = torch.where(chosen & _happens(fate, 0.0, 0.8), vocabulary.mask_id, ids)
    random_ids = (_draw(keys, positions, _TOKEN) % vocabulary.size).to(ids.dtype)
    masked = torch.where(chosen & _happens(fate, 0.8, 0.9), random_ids, masked)
    return masked, ids.long().masked_fill(~chosen, IGNORED)


def _choose_words(ids, vocabulary, keys, positions, rate, padded):
    """bool [n, length]: the tokens of the words that fit into the budget, in random order."""
    real = ids != vocabulary.pad_id
    candidates = ids != vocabulary.cls_id
    if vocabulary.sep_id is not None:
        candidates &= ids != vocabulary.sep_id
    if not padded:
        candidates &= real
    length = ids.shape[1]
    if length == 0:
        return candidates
    left = torch.full_like(keys, length) if padded else real.sum(1)
    left = (left.double() * rate).round().clamp(min=1).long()[:, None]

    before = candidates.cumsum(1) - candidates.long()  # candidates before each position
    starts = candidates & (~vocabulary.continuation[ids.long()] | (before == 0))
    total = candidates.sum(1, keepdim=True)
    # Candidates before the next word's start, or all of them: the first of the later starts.
    following = torch.where(starts, before, total)[:, 1:]
    following = torch.cat([following, total], 1).flip(1).cummin(1).values.flip(1)
    sizes = following - before

    # Passing over a word that is too large is final, since what is left only shrinks: the next word
    # of a random order is the first that is still open and fits.
    order = _draw(keys, positions, _CHOICE).masked_fill(~starts, _LAST)
    taken = torch.zeros_like(starts)
    for _ in range(max(1, round(rate * length))):
        first, where = order.masked_fill(sizes > left, _LAST).min(1, keepdim=True)
        fits = first < _LAST
        at = fits & (positions == where)
        taken |= at
        order = order.masked_fill(at, _LAST)
        left = left - sizes.gather(1, where) * fits
    start_of_word = torch.where(starts, positions, 0).cummax(1).values
    return candidates & real & taken.gather(1, start_of_word)


def _draw(keys: torch.Tensor, positions: torch.Tensor, stream: int) -> torch.Tensor:
    """Numbers from 0 to 2**63 - 1, [keys, positions]."""
    counter = positions * 4 + (stream + 1)
    return shift(mix(mix(keys + GOLDEN)[:, None] + counter * GOLDEN), 1)


def _happens(random: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Whether a random number, taken for a fraction of its range, lies from ``low`` to below
    ``high``."""
    part = random >> 10  # 53 bits, which a float holds exactly
    return (part >= round(low * 2**53)) & (part < round(high * 2**53))


def _check(ids, vocabulary, keys, rate, budget):
    for name, value in (("ids", ids), ("keys", keys)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if not isinstance(vocabulary, MaskingVocabulary):
        got = type(vocabulary).__name__
        raise TypeError(f"vocabulary: expected a MaskingVocabulary, got {got}")
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ids: expected int32 or int64, got {ids.dtype}")
    if ids.ndim != 2:
        raise ValueError(f"ids: expected [n, length], got shape {tuple(ids.shape)}")
    if keys.dtype != torch.int64:
        raise TypeError(f"keys: expected int64, from sample_keys; got {keys.dtype}")
    if keys.shape != ids.shape[:1]:
        raise ValueError(
            f"keys: expected one for each of the {ids.shape[0]} rows of ids, "
            f"got shape {tuple(keys.shape)}"
        )
    for name, tensor in (("keys", keys), ("vocabulary.continuation", vocabulary.continuation)):
        if tensor.device != ids.device:
            raise ValueError(
                f"{name}: expected it on the device of ids, {ids.device}; got {tensor.device}; "
                f"move it there once with .to(device)"
            )
    if vocabulary.continuation.shape != (vocabulary.size,):
        raise ValueError(
            f"vocabulary.continuation: expected shape ({vocabulary.size},), "
            f"got {tuple(vocabulary.continuation.shape)}"
        )
    if not isinstance(rate, Real) or not 0 <= float(rate) <= 1:
        raise ValueError(f"rate: expected 0 to 1, got {rate!r}")
    if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
        lowest, highest = ids.aminmax()
        if lowest < 0 or highest >= vocabulary.size:
            raise ValueError(
                f"ids: expected 0 to {vocabulary.size - 1}, the vocabulary's, got "
                f"{lowest.item()} to {highest.item()}"
            )
    if budget not in ("real", "padded"):
        raise ValueError(f"budget: expected 'real' or 'padded', got {budget!r}")
