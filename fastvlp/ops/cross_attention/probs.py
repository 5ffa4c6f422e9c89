"""Attention that stores its weights, for those who want to look at them.

Queries are spread to [segments, longest, ...] and computed as a plain batch, whose weights and
output autograd differentiates.
"""

import torch

from .dropout import keep_mask


def attend_with_probs(
    q, k, v, cu_seqlens_q, cu_seqlens_k, *, key_mask, causal, scale, dropout_p, dropout_seed
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output [total_q, H, d] and the weights before dropout [total_q, H, most keys]."""
    q_segment, q_place, q_counts = _places(cu_seqlens_q, len(q))
    if cu_seqlens_k is None:
        k_counts = torch.full_like(q_counts, k.shape[1])
        attended = torch.ones(k.shape[:2], dtype=torch.bool, device=k.device)
        attended = attended if key_mask is None else key_mask
    else:
        k_segment, k_place, k_counts = _places(cu_seqlens_k, len(k))
        shape = len(k_counts), int(k_counts.max()) if len(k_counts) else 0
        k, v = (_spread(t, shape, k_segment, k_place) for t in (k, v))
        attended = torch.zeros(shape, dtype=torch.bool, device=k.device)
        attended[k_segment, k_place] = True if key_mask is None else key_mask
    # Zeros in place of masked keys: those may hold NaN.
    k, v = (torch.where(attended[..., None, None], t, 0) for t in (k, v))
    keys = k.shape[1]
    logits = scale * torch.einsum("qhd,qkhd->qhk", q, k[q_segment])
    allowed = attended[q_segment]
    if causal:
        last = q_place - q_counts[q_segment] + k_counts[q_segment]
        allowed = allowed & (torch.arange(keys, device=q.device) <= last[:, None])
    some = allowed.any(-1)[:, None, None]
    logits = torch.where(some, logits.masked_fill(~allowed[:, None], -torch.inf), 0.0)
    probs = logits.softmax(-1) * allowed[:, None]
    weights = probs
    if dropout_p:
        rows = torch.arange(len(q), device=q.device)
        keep = keep_mask(dropout_seed.item(), rows, q.shape[1], keys, dropout_p)
        weights = probs * keep.transpose(0, 1) / (1 - dropout_p)
    return torch.einsum("qhk,qkhd->qhd", weights, v[q_segment]), probs


def _places(starts: torch.Tensor, rows: int) -> tuple[torch.Tensor, ...]:
    """The segment of each row, its place there, and the rows of each segment."""
    starts = starts.long()
    counts = starts[1:] - starts[:-1]
    segment = torch.repeat_interleave(
        torch.arange(len(counts), device=starts.device), counts, output_size=rows
    )
    return segment, torch.arange(rows, device=starts.device) - starts[segment], counts


def _spread(t: torch.Tensor, shape, segment, place) -> torch.Tensor:
    out = t.new_zeros(*shape, *t.shape[1:])
    return out.index_put((segment, place), t)
