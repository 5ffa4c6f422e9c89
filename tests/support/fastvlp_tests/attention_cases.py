"""Random inputs of cross_attention, its gradients three ways, and the rounding nobody avoids."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch

from fastvlp.ops import cross_attention, cross_attention_reference
from fastvlp.ops.cross_attention.dropout import keep_mask
from fastvlp_tests.tolerance import assert_as_accurate, epsilon

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ("contiguous", "fused", "heads first", "wide rows", "strided")
MASKS = (None, "holes", "middle", "prefix")


@dataclass(frozen=True)
class Case:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cu_q: torch.Tensor
    cu_k: torch.Tensor | None
    key_mask: torch.Tensor | None
    upstream: torch.Tensor

    def arguments(self):
        return (self.q, self.k, self.v, self.cu_q, self.cu_k), {"key_mask": self.key_mask}


@dataclass(frozen=True)
class Result:
    out: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


NAMES = [field.name for field in fields(Result)]


def draw(
    q_lengths: Sequence[int],
    keys: int | Sequence[int],
    *,
    heads: int = 2,
    dim: int = 64,
    dtype: torch.dtype = torch.float32,
    device="cpu",
    mask: str | None = None,
    layout: str = "contiguous",
    norms: Sequence[float] = (1.0, 1.0, 1.0),
    cu_dtype: torch.dtype = torch.int32,
    seed: int = 0,
) -> Case:
    """`keys`: a number for k, v of [n, L, H, d], a list of lengths for packed ones.

    `norms` multiply q, k and v. `layout` is how the tensors lie in memory (see `lay_out`).
    """
    g = torch.Generator().manual_seed(seed)
    packed = not isinstance(keys, int)
    total, key_shape = sum(q_lengths), (sum(keys),) if packed else (len(q_lengths), keys)
    shapes = [(total,), key_shape, key_shape, (total,)]
    tensors = [torch.randn(*s, heads, dim, generator=g, dtype=torch.float64) for s in shapes]
    q, k, v, upstream = (
        (norm * t).to(dtype).to(device) for norm, t in zip((*norms, 1.0), tensors, strict=True)
    )
    key_mask = None if mask is None else draw_mask(mask, q_lengths, keys, g).to(device)
    return Case(
        *(lay_out(t, layout) for t in (q, k, v)),
        cumulative(q_lengths, cu_dtype, device),
        cumulative(keys, cu_dtype, device) if packed else None,
        key_mask,
        upstream,
    )


def cumulative(lengths: Sequence[int], dtype=torch.int32, device="cpu") -> torch.Tensor:
    starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    return torch.tensor(starts, dtype=dtype, device=device)


def draw_mask(kind: str, q_lengths, keys, generator) -> torch.Tensor:
    """holes: any pattern, 40 % masked; middle: one hole, as ViLT has; prefix: padding."""
    rows = []
    for length in [keys] * len(q_lengths) if isinstance(keys, int) else keys:
        at = torch.arange(length)
        first, second = torch.randint(0, length + 1, (2,), generator=generator).sort().values
        if kind == "holes":
            rows.append(torch.rand(length, generator=generator) > 0.4)
        elif kind == "middle":
            rows.append((at < first) | (at >= second))
        else:
            rows.append(at < second)
    if not isinstance(keys, int):
        return torch.cat(rows) if rows else torch.zeros(0, dtype=torch.bool)
    return torch.stack(rows) if rows else torch.zeros(0, keys, dtype=torch.bool)


def lay_out(t: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in other memory; NaN lies wherever the view does not reach."""
    *rows, heads, dim = t.shape
    nan = float("nan")
    if layout == "fused":  # a view of one projection for q, k and v
        view = t.new_full((*rows, 3, heads, dim), nan)[..., 1, :, :]
    elif layout == "heads first":
        view = t.new_full((*rows[:-1], heads, rows[-1], dim), nan).transpose(-3, -2)
    elif layout == "wide rows":
        view = t.new_full((*rows, heads, dim + 3), nan)[..., 1 : dim + 1]
    elif layout == "strided":  # not even the elements of a row are neighbours
        view = t.new_full((*rows, heads, 2 * dim), nan)[..., ::2]
    else:
        return t
    return view.copy_(t)


def run(function: Callable, case: Case, dtype=None, **options) -> Result:
    """Output and every gradient, inputs in `dtype` (None: as they are)."""
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (case.q, case.k, case.v)]
    out = function(*leaves, case.cu_q, case.cu_k, key_mask=case.key_mask, **options)
    if not out.requires_grad and not case.q.numel():  # a loop over no segment
        return Result(out, *map(torch.zeros_like, leaves))
    gradients = torch.autograd.grad(
        out, leaves, case.upstream.to(out.dtype), allow_unused=True, materialize_grads=True
    )
    return Result(out.detach(), *gradients)


def check(case: Case, **options) -> Result:
    """cross_attention on `case` is as accurate as the tolerance policy asks."""
    ours = run(cross_attention, case, **options)
    options.pop("max_seqlen_q", None), options.pop("max_seqlen_k", None)
    eager = run(cross_attention_reference, case, **options)
    exact = run(cross_attention_reference, case, torch.float64, **options)
    floors = rounding(case, **options)
    for name in NAMES:
        got, wanted = getattr(ours, name), getattr(exact, name)
        assert got.dtype == case.q.dtype
        result = epsilon(got.dtype) * wanted.norm().item()
        assert_as_accurate(name, got, getattr(eager, name), wanted, floors[name] + result)
    return ours


def segments(case: Case):
    """(query rows, key index, visible keys) of each segment; the index of k and v."""
    starts = case.cu_q.tolist()
    key_starts = None if case.cu_k is None else case.cu_k.tolist()
    for i in range(len(starts) - 1):
        keys = i if key_starts is None else slice(key_starts[i], key_starts[i + 1])
        count = case.k[keys].shape[0]
        attended = torch.ones(count, dtype=torch.bool, device=case.q.device)
        attended = attended if case.key_mask is None else case.key_mask[keys]
        yield slice(starts[i], starts[i + 1]), keys, attended


def weights(case: Case, segment, causal=False, scale=None):
    """Logits (-inf where masked), softmax weights (0 in a row that attends nothing), float64."""
    rows, keys, attended = segment
    scale = case.q.shape[-1] ** -0.5 if scale is None else scale
    k = visible(case.k, keys, attended)
    logits = scale * torch.einsum("qhd,khd->hqk", case.q[rows].double(), k)
    count = rows.stop - rows.start
    allowed = attended.expand(count, len(attended))
    if causal:  # aligned at the last key
        allowed = allowed & torch.ones_like(allowed).tril(len(attended) - count)
    logits = logits.masked_fill(~allowed, -torch.inf)
    return logits, logits.softmax(-1).nan_to_num(0.0)


def visible(t: torch.Tensor, keys, attended: torch.Tensor) -> torch.Tensor:
    """Rows of k or v in float64, zero where masked."""
    return t[keys].double().masked_fill(~attended[:, None, None], 0.0)


def rounding(case: Case, causal=False, scale=None, dropout_p=0.0, dropout_seed=0) -> dict:
    """First-order rounding of every result, each rounding independent of the others.

    Counted are: a logit and its terms, each weight and each logit gradient in the dtype of the
    products, the terms of the other sums, all in float32 otherwise. Where an eager computation
    is exact by luck (one key, one-hot rows), this is what is left to allow.
    """
    low, single = epsilon(case.q.dtype) ** 2, epsilon(torch.float32) ** 2
    heads, dim = case.q.shape[1:]
    used_scale = dim**-0.5 if scale is None else scale
    total = dict.fromkeys(NAMES, 0.0)
    for segment in segments(case):
        rows, keys, attended = segment
        q, g = case.q[rows].double(), case.upstream[rows].double()
        k, v = visible(case.k, keys, attended), visible(case.v, keys, attended)
        logits, p = weights(case, segment, causal, scale)
        terms = used_scale**2 * torch.einsum("qhd,khd->hqk", q**2, k**2)
        spread = torch.where(logits > -torch.inf, logits**2 + terms, 0.0)
        spread = (p**2 * spread).sum(-1, keepdim=True) + (1 - 2 * p) * spread
        unit = low + single * (1 + spread)
        keep = torch.ones_like(p)
        if dropout_p:
            at = torch.arange(rows.start, rows.stop, device=q.device)
            keep = keep_mask(dropout_seed, at, heads, len(attended), dropout_p)
            keep = keep / (1 - dropout_p)
        w = (p * keep) ** 2 * unit
        dp = torch.einsum("qhd,khd->hqk", g, v) * keep
        dp_terms = single * keep**2 * torch.einsum("qhd,khd->hqk", g**2, v**2)
        mean = (p * dp).sum(-1, keepdim=True)
        mean_spread = (p**2 * (dp**2 * unit + dp_terms)).sum(-1, keepdim=True)
        ds = (p * (dp - mean)) ** 2 * unit + p**2 * (dp_terms + mean_spread)
        total["out"] += torch.einsum("hqk,khd->", w, v**2)
        total["v"] += torch.einsum("hqk,qhd->", w, g**2)
        total["q"] += used_scale**2 * torch.einsum("hqk,khd->", ds, k**2)
        total["k"] += used_scale**2 * torch.einsum("hqk,qhd->", ds, q**2)
    return {name: float(value) ** 0.5 for name, value in total.items()}


def without(case: Case, **changes) -> Case:
    """The case with some fields replaced."""
    return replace(case, **changes)
