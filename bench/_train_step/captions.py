"""Random captions as long as those of the pretraining sets, for benchmarks of whole steps."""

import torch
from torch import Tensor

# About 12 tokens on average, start and end included.
MEAN_LENGTH, SPREAD, SHORTEST = 12, 4, 5
MASKED, MASK_ID, IGNORED = 0.15, 4, -100
FIRST_WORD = 5  # ids below it are special tokens


def caption_lengths(batch: int, padded: int, full: bool) -> Tensor:
    """Tokens of each of `batch` texts: `padded`, or as captions have."""
    if full:
        return torch.full((batch,), padded)
    # Quantiles of a normal distribution, so that the mean is met at any batch size.
    lengths = torch.special.ndtri((torch.arange(batch) + 0.5) / batch) * SPREAD + MEAN_LENGTH
    return lengths.round().clamp(SHORTEST, padded).long()


def captions(
    batch: int, padded: int, vocabulary: int, full: bool, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random texts for masked language modelling: ids, lengths, masked ids and labels."""
    lengths = caption_lengths(batch, padded, full)
    ids = torch.randint(FIRST_WORD, vocabulary, (batch, padded), generator=generator)
    return (ids, lengths, *masked(ids, lengths, generator))


def masked(ids: Tensor, lengths: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """15 % of the tokens masked, at least one a text and never the first; and their labels."""
    inside = torch.arange(ids.shape[1]) < lengths[:, None]
    chosen = (torch.rand(ids.shape, generator=generator) < MASKED) & inside
    chosen[:, 0] = False
    chosen[:, 1] |= ~chosen.any(1)
    return torch.where(chosen, MASK_ID, ids), torch.where(chosen, ids, IGNORED)
