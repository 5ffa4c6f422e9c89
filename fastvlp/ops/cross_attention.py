"""Attention of packed queries to the keys of their own segment: fusion encoders and packed text.

    s_ij = scale <q_i, k_j>,  p_i = softmax of s_i over the keys that row i may see,
    out_i = sum_j dropout(p_ij) v_j

Source: Vaswani et al., "Attention is all you need", arXiv 1706.03762, section 3.2; the fusion
encoder of Li et al., "Align before fuse" (ALBEF), arXiv 2107.07651, section 3.1; recomputation in
the backward pass after Dao et al., "FlashAttention", arXiv 2205.14135, section 3.

A segment is one image with all the query rows that attend to it (`cu_seqlens_q`): the tokens of its
positive text, of its hard negatives and of the masked pass lie one after another, without padding,
and its keys and values are read once for all of them. With `cu_seqlens_k` the keys are packed as
well: the self-attention of packed text is q, k, v with the same cumulative lengths.

Cost for a segment of M query and L key rows and each head: 4 M L d FLOP forward, 10 M L d backward,
which computes the weights again. Memory: output, gradients and one log-sum-exp per query row and
head; the M x L weights are never stored, except for `return_probs`.

Products of float32 inputs are float32; those of bfloat16 use bfloat16 multiplications with float32
sums; softmax and sums are float32 always.
"""

import torch

from . import _dropout


def cross_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None = None,
    *,
    key_mask: torch.Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int = 0,
) -> torch.Tensor:
    """The definition of `cross_attention`: segment by segment, any floating dtype."""
    heads, dim = q.shape[1:]
    scale = dim**-0.5 if scale is None else scale
    q_starts = cu_seqlens_q.tolist()
    k_starts = None if cu_seqlens_k is None else cu_seqlens_k.tolist()
    out = torch.zeros(*q.shape[:2], v.shape[-1], dtype=q.dtype, device=q.device)
    for i, (begin, end) in enumerate(zip(q_starts[:-1], q_starts[1:], strict=True)):
        keys = i if k_starts is None else slice(k_starts[i], k_starts[i + 1])
        seen = torch.ones(k[keys].shape[0], dtype=torch.bool, device=q.device)
        seen = seen if key_mask is None else key_mask[keys]
        # Unseen keys are left out, not multiplied by zero: they may hold NaN.
        where = seen.nonzero()[:, 0]
        logits = scale * torch.einsum("qhd,khd->hqk", q[begin:end], k[keys][where])
        rows = torch.arange(begin, end, device=q.device)
        allowed = torch.ones(end - begin, len(where), dtype=torch.bool, device=q.device)
        if causal:  # aligned at the last key
            allowed = where <= (rows - end)[:, None] + len(seen)
        some = allowed.any(-1, keepdim=True)
        logits = torch.where(some, logits.masked_fill(~allowed, -torch.inf), 0.0)
        p = logits.softmax(-1) * allowed
        if dropout_p:
            keep = _dropout.keep_mask(dropout_seed, rows, heads, len(seen), dropout_p)
            p = p * keep[..., where] / (1 - dropout_p)
        out[begin:end] = torch.einsum("hqk,khd->qhd", p, v[keys][where])
    return out
