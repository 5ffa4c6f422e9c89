"""What cross_attention.py computes on: shapes, random inputs, padding, and the float64 result."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from _harness.measure import DTYPES
from torch import Tensor

# Shortest and longest random caption; peers pad all of them to the longest.
CAPTION = (5, 30)
SEED = 0
PARTS = ("cross", "ragged", "self")


@dataclass(frozen=True)
class Case:
    """One comparison. `part`: which attention is measured.

    cross: every image has `queries` query rows; ragged: every image has queries / 30 captions
    of random lengths, so at most `queries` rows; self: the self-attention of `images` captions of
    random lengths (`keys` and `mask` do not count).
    """

    part: str = "cross"
    images: int = 32
    heads: int = 12
    dim: int = 64
    keys: int = 577
    queries: int = 30
    dtype: str = "fp32"
    mask: bool = False
    dropout: float = 0.0
    device: str = "cpu"

    def shape(self) -> dict[str, int]:
        found = {"images": self.images, "queries": self.queries, "keys": self.keys}
        if self.part == "self":
            del found["queries"]
            found["keys"] = CAPTION[1]
        return found | {"heads": self.heads, "d": self.dim}

    def op(self) -> str:
        name = {"cross": "cross_attention", "ragged": "cross_attention, ragged text"}
        options = [", key mask"] * self.has_mask() + [", dropout"] * bool(self.dropout)
        return name.get(self.part, "self_attention, ragged text") + "".join(options)

    def has_mask(self) -> bool:
        return self.mask and self.part != "self"

    def tiny(self) -> Case:
        """A small case of the same kind."""
        return replace(self, images=2, queries=min(self.queries, 30), keys=min(self.keys, 40))


@dataclass(frozen=True)
class Inputs:
    """Packed tensors as fastvlp takes them, and the lengths, known on the host.

    k, v: [images, keys, heads, dim], or packed as q is where cu_k is given.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    cu_q: Tensor
    cu_k: Tensor | None
    q_lengths: tuple[int, ...]
    k_lengths: tuple[int, ...]
    key_mask: Tensor | None
    upstream: Tensor
    dropout: float


def draw(case: Case) -> Inputs:
    """The inputs of a case; the same for the same case."""
    generator = torch.Generator().manual_seed(SEED)

    def normal(*shape: int) -> Tensor:
        values = torch.randn(*shape, case.heads, case.dim, generator=generator)
        return values.to(case.device, DTYPES[case.dtype])

    lengths = query_lengths(case, generator)
    total = sum(lengths)
    cu_q = cumulative(lengths, case.device)
    keys = (total,) if case.part == "self" else (case.images, case.keys)
    mask = None
    if case.has_mask():
        mask = hole_mask(case.images, case.keys, generator).to(case.device)
    return Inputs(
        q=normal(total),
        k=normal(*keys),
        v=normal(*keys),
        cu_q=cu_q,
        cu_k=cu_q if case.part == "self" else None,
        q_lengths=tuple(lengths),
        k_lengths=tuple(lengths) if case.part == "self" else (case.keys,) * case.images,
        key_mask=mask,
        upstream=normal(total),
        dropout=case.dropout,
    )


def query_lengths(case: Case, generator: torch.Generator) -> list[int]:
    """How many query rows each image, or each caption, has; the first use of the generator."""
    captions = max(1, case.queries // CAPTION[1]) if case.part == "ragged" else 1
    low, high = CAPTION
    lengths = torch.randint(low, high + 1, (case.images, captions), generator=generator).sum(1)
    return [case.queries] * case.images if case.part == "cross" else lengths.tolist()


def cumulative(lengths: Sequence[int], device: str) -> Tensor:
    starts = [0, *itertools.accumulate(lengths)]
    return torch.tensor(starts, dtype=torch.int32, device=device)


def hole_mask(images: int, keys: int, generator: torch.Generator) -> Tensor:
    """True where a key counts: all but a hole of random place and size in the middle, as ViLT's
    concatenation of padded text and padded image has it."""
    start = keys // 4 + torch.randint(0, keys // 4 + 1, (images, 1), generator=generator)
    size = torch.randint(1, max(2, keys // 4), (images, 1), generator=generator)
    at = torch.arange(keys)
    return (at < start) | (at >= start + size)


def pad(packed: Tensor, lengths: Sequence[int]) -> Tensor:
    """[total, ...] to [segments, longest, ...], zero behind each segment's end."""
    longest = max(lengths)
    if set(lengths) == {longest}:
        return packed.view(len(lengths), longest, *packed.shape[1:])
    padded = packed.new_zeros(len(lengths), longest, *packed.shape[1:])
    padded[filled(lengths, packed.device)] = packed
    return padded


def filled(lengths: Sequence[int], device: Any = "cpu") -> Tensor:
    """Which positions of the padded form hold a row: bool [segments, longest]."""
    ends = torch.tensor(lengths, device=device)[:, None]
    return torch.arange(max(lengths), device=device) < ends


@dataclass(frozen=True)
class Padded:
    """The inputs as the peers take them: [segments, longest, heads, dim]; mask None: no need."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    upstream: Tensor


def padded(inputs: Inputs) -> Padded:
    keys, mask = [inputs.k, inputs.v], inputs.key_mask
    if inputs.cu_k is not None:
        keys = [pad(each, inputs.k_lengths) for each in keys]
        mask = filled(inputs.k_lengths, inputs.q.device)
    return Padded(
        pad(inputs.q, inputs.q_lengths), *keys, mask, pad(inputs.upstream, inputs.q_lengths)
    )


def packed_results(inputs: Inputs, results: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Results of a peer, [segments, heads, longest, dim], as the float64 reference has them."""
    rows = filled(inputs.q_lengths, inputs.q.device)
    found = {}
    for name, value in results.items():
        tokens = value.transpose(1, 2)
        is_key = name in ("d_k", "d_v")
        whole = is_key and inputs.cu_k is None
        found[name] = tokens if whole else tokens[rows]
    return found


def float64_reference(backward: bool, inputs: Inputs) -> dict[str, Tensor]:
    """Output and gradients in float64, image by image: one image's weights are held at a time."""
    from fastvlp.ops import cross_attention_reference

    parts: dict[str, list[Tensor]] = {}
    for i, length in enumerate(inputs.q_lengths):
        begin = int(inputs.cu_q[i])
        rows = slice(begin, begin + length)
        keys = slice(i, i + 1)
        mask = None if inputs.key_mask is None else inputs.key_mask[keys].flatten()
        leaves = [inputs.q[rows]]
        for each in (inputs.k, inputs.v):
            leaves.append(each[rows] if inputs.cu_k is not None else each[keys].flatten(0, 1))
        leaves = [leaf.double().detach().requires_grad_(backward) for leaf in leaves]
        cu = [cumulative([len(leaf)], "cpu") for leaf in leaves[:2]]
        out = cross_attention_reference(*leaves, *cu, key_mask=mask)
        parts.setdefault("out", []).append(out.detach())
        if backward:
            gradients = torch.autograd.grad(out, leaves, inputs.upstream[rows].double())
            for name, value in zip(("d_q", "d_k", "d_v"), gradients, strict=True):
                parts.setdefault(name, []).append(value)
    found = {name: torch.cat(values) for name, values in parts.items()}
    for name in ("d_k", "d_v"):
        if name in found and inputs.cu_k is None:
            found[name] = found[name].view(inputs.k.shape)
    return found


def work(inputs: Inputs) -> dict[str, float]:
    """Arithmetic and least traffic of the attention, see `work_of`."""
    heads, dim = inputs.q.shape[1:]
    return work_of(inputs.q_lengths, inputs.k_lengths, heads, dim, inputs.q.element_size())


def work_of(
    q_lengths: Sequence[int], k_lengths: Sequence[int], heads: int, dim: int, element: int
) -> dict[str, float]:
    """Arithmetic and least traffic of the attention: GFLOP of one of its matmuls (two forward,
    four or five backward), MB read and written forward, and forward and backward."""
    pairs = sum(q * k for q, k in zip(q_lengths, k_lengths, strict=True))
    queries, keys = (sum(lengths) * heads * dim * element for lengths in (q_lengths, k_lengths))
    return {
        "gflop_per_matmul": 2e-9 * pairs * heads * dim,
        "mb_forward": 1e-6 * (2 * queries + 2 * keys),
        # Once more q, k, v, the output and its gradient; then the three gradients.
        "mb_forward_backward": 1e-6 * (6 * queries + 6 * keys),
    }
