"""Attention of packed queries to the keys of their own segment: fusion encoders and packed text."""

import torch
from torch.autograd import forward_ad

from ..._autograd import Function
from .._core.backends import unit_stride
from .._core.dispatch import choose, register_backends
from .._core.implement import without_autocast
from .checks import (
    CANDIDATES,
    NO_SEED,
    check_inputs,
    distinct,
    longest,
    operator_takes,
    seed_tensor,
)
from .dropout import keep_mask
from .probs import attend_with_probs
from .register import register_operators


def cross_attention(
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
    dropout_seed: int | torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_probs: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of each segment's query rows to the segment's keys.

        s_ij = scale <q_i, k_j>,  p_i = softmax of s_i over the keys that row i attends,
        out_i = sum_j dropout(p_ij) v_j

    Source: Vaswani et al., "Attention is all you need", arXiv 1706.03762, section 3.2; the fusion
    encoder of Li et al., "Align before fuse" (ALBEF), arXiv 2107.07651, section 3.1; recomputation
    in the backward pass after Dao et al., "FlashAttention", arXiv 2205.14135, section 3.

    A segment is one image with all the query rows that attend to it (`cu_seqlens_q`): the tokens of
    its positive text, of its hard negatives and of the masked pass lie one after another, without
    padding, and its keys and values are read once for all of them. With `cu_seqlens_k` the keys are
    packed as well: the self-attention of packed text is q, k, v with the same cumulative lengths.

    Cost for a segment of M query and L key rows and each head: 4 M L d FLOP forward, 10 M L d
    backward, which computes the weights again. Memory: output, gradients and one log-sum-exp per
    query row and head; the M x L weights are never stored, except for `return_probs`.

    Matmuls of float32 inputs are float32; those of bfloat16 use bfloat16 multiplications with
    float32 sums; softmax and sums are float32 always.

    Args:
        q: [total_q, H, d] query rows, those of segment i at cu_seqlens_q[i] to cu_seqlens_q[i+1];
            float32, bfloat16 or float16 (float64 through the reference); d at most 128 on a GPU.
        k, v: [n, L, H, d], L keys for each of n segments, or [total_k, H, d] with `cu_seqlens_k`;
            the dtype and device of q. Any strides; views of a fused projection cost nothing while
            the last axis is contiguous. On a CPU fastest as views of [n, H, L, d], whose gradients
            lie as they do.
        cu_seqlens_q: [n + 1] int32 or int64, from 0 to total_q, never decreasing.
        cu_seqlens_k: the same for packed keys.
        key_mask: [n, L], or [total_k], bool, True where a key is attended; any pattern. What masked
            keys and values hold, NaN included, has no effect; their gradients are zero.
        causal: a query row attends no later key; rows and keys are aligned at the segment's end.
        scale: factor of the logits q k^T, default d^-1/2; of magnitude up to 1e6 unless in float64.
        dropout_p: probability with which a weight is dropped; the others are divided by 1 - p.
        dropout_seed: the mask is a function of it and of positions
            (`fastvlp.ops.cross_attention.dropout`). By default a random one of torch's generator.
        max_seqlen_q, max_seqlen_k: bounds on the segments' rows. On a GPU, leaving them out costs
            a wait for the device wherever they cannot be read off a shape; compiled code does not
            wait, but launches programs for a segment of all rows.
        return_probs: also return the weights. This path stores them, and is for looking at them
            and at their gradients (GradCAM), not for training at speed.

    Returns:
        [total_q, H, d] in the dtype of q, differentiable once with respect to q, k and v. Rows that
        attend no key are 0 and have zero gradients. With `return_probs` also the weights before
        dropout, [total_q, H, largest number of keys], 0 where a row attends no key: the output is
        computed from them, so that they have gradients.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it. On a GPU the
            values in cu_seqlens are not looked at.
        RuntimeError: FASTVLP_BACKEND forces an implementation that cannot run, or a second
            derivative is asked for.

    Examples:
        >>> import torch
        >>> from fastvlp.ops import cross_attention
        >>> q = torch.randn(7, 2, 16)  # two images: 4 and 3 rows of text
        >>> k, v = torch.randn(2, 2, 49, 2, 16)
        >>> cross_attention(q, k, v, torch.tensor([0, 4, 7])).shape
        torch.Size([7, 2, 16])
    """
    tensors = q, k, v, cu_seqlens_q, cu_seqlens_k, key_mask
    bounds = max_seqlen_q, max_seqlen_k
    if not return_probs and operator_takes(*tensors, scale, dropout_p, *bounds):
        has_seed = dropout_p or dropout_seed is not None
        seed = seed_tensor(dropout_seed, dropout_p, q.device) if has_seed else NO_SEED
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        rows = max_seqlen_q or 0, max_seqlen_k or 0
        arguments = *tensors, seed, factor, dropout_p, bool(causal), *rows
        if _has_derivatives(q, k, v):
            return _CrossAttention.apply(*arguments)
        return torch.ops.fastvlp.cross_attention_forward(*arguments)[0]
    check_inputs(*tensors, scale, dropout_p, *bounds)
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    seed = seed_tensor(dropout_seed, dropout_p, q.device)
    causal = bool(causal)
    options = {"causal": causal, "scale": scale, "dropout_p": dropout_p}
    if return_probs:
        return without_autocast(attend_with_probs)(
            q, k, v, cu_seqlens_q, cu_seqlens_k, key_mask=key_mask, dropout_seed=seed, **options
        )
    if choose("cross_attention", q, k, v) == "reference":
        return without_autocast(cross_attention_reference)(
            q, k, v, cu_seqlens_q, cu_seqlens_k, key_mask=key_mask, dropout_seed=seed.item(),
            **options,
        )  # fmt: skip
    max_q = longest(cu_seqlens_q, max_seqlen_q, q.device, len(q))
    if cu_seqlens_k is None:
        max_k = k.shape[1]
    else:
        max_k = longest(cu_seqlens_k, max_seqlen_k, q.device, len(k))
    key_mask = None if key_mask is None else key_mask.contiguous()
    strided = (unit_stride(t) for t in (q, k, v))
    return _CrossAttention.apply(
        *distinct(*strided, cu_seqlens_q, cu_seqlens_k), key_mask, seed, scale, dropout_p, causal,
        max_q, max_k,
    )  # fmt: skip


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
        attended = torch.ones(k[keys].shape[0], dtype=torch.bool, device=q.device)
        attended = attended if key_mask is None else key_mask[keys]
        # Masked keys are left out, not multiplied by zero: they may hold NaN.
        where = attended.nonzero()[:, 0]
        logits = scale * torch.einsum("qhd,khd->hqk", q[begin:end], k[keys][where])
        rows = torch.arange(begin, end, device=q.device)
        allowed = torch.ones(end - begin, len(where), dtype=torch.bool, device=q.device)
        if causal:  # aligned at the last key
            allowed = where <= (rows - end)[:, None] + len(attended)
        some = allowed.any(-1, keepdim=True)
        logits = torch.where(some, logits.masked_fill(~allowed, -torch.inf), 0.0)
        p = logits.softmax(-1) * allowed
        if dropout_p:
            keep = keep_mask(dropout_seed, rows, heads, len(attended), dropout_p)
            p = p * keep[..., where] / (1 - dropout_p)
        out[begin:end] = torch.einsum("hqk,khd->qhd", p, v[keys][where])
    return out


def _has_derivatives(q, k, v) -> bool:
    """Whether anyone may ask for one: autograd in either direction, or a transform of functions."""
    return (
        (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
    )


def _gradients(*arguments):
    operator = torch.ops.fastvlp.cross_attention_backward
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return operator(*arguments)
    # Nobody will differentiate these. Autograd's layer of the operator, there to refuse that, takes
    # longer to see so than gradients of a few rows.
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


class _CrossAttention(Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_q, cu_k, key_mask, seed, *options):
        out, statistics = torch.ops.fastvlp.cross_attention_forward(
            q, k, v, cu_q, cu_k, key_mask, seed, *options
        )
        ctx.save_for_backward(q, k, v, out, statistics, cu_q, cu_k, key_mask, seed)
        ctx.options = options
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, statistics, cu_q, cu_k, key_mask, seed = ctx.saved_tensors
        gradients = _gradients(
            unit_stride(grad), q, k, v, out, statistics, cu_q, cu_k, key_mask, seed, *ctx.options
        )
        return *gradients, *(None for _ in range(4 + len(ctx.options)))


register_operators()
register_backends(
    "cross_attention", example={"q": (2, 1, 8), "k": (1, 4, 1, 8), "v": (1, 4, 1, 8)}, **CANDIDATES
)
