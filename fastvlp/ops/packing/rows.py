"""Rows taken from a tensor by an index computed on the host, differentiable without atomics.

A `RowMap` says which input row each output row copies (or none: zeros). Its transpose, which the
backward pass needs, is laid out beforehand: the input rows sorted by how often they are used, and
one index for the first use of each, one for the second use of those that have it, and so on. Each
round adds whole rows, in the same order every time, and all rounds together read every output row
once. Sums of half-precision rows are taken in float32.
"""

from dataclasses import dataclass

import torch

from ..._autograd import Function
from .._core.checks import check_tensor


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy from host memory that no stream waits for."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def running_sum(lengths: torch.Tensor) -> torch.Tensor:
    """0 and the sums of the first 1, 2, ... lengths, int64 on the host: where segments begin.

    Raises:
        ValueError: the last does not fit into int32, which operators take.
    """
    sums = torch.zeros(len(lengths) + 1, dtype=torch.int64)
    torch.cumsum(lengths, 0, out=sums[1:])
    if sums[-1] > torch.iinfo(torch.int32).max:
        raise ValueError(f"cu_seqlens: expected at most 2**31 - 1 tokens, got {sums[-1]}")
    return sums


def ranges(starts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """start, start + 1, ..., `length` numbers for each start; int64 on the host."""
    before = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum())) + torch.repeat_interleave(starts - before, lengths)


@dataclass(frozen=True, eq=False)
class RowMap:
    """output[i] = input[source[i]], or zeros where i is in `absent`.

    Attributes:
        source: int64 [outputs].
        absent: int64, the output rows that copy nothing; None where there is none.
        rounds: int64 each, the output rows that are the first, second, ... use of an input row.
        back: int64 [inputs], the place of each input row in the rounds.
        unused: int64, the input rows that no output row copies; None where there is none.
    """

    source: torch.Tensor
    absent: torch.Tensor | None
    rounds: tuple[torch.Tensor, ...]
    back: torch.Tensor
    unused: torch.Tensor | None

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """[inputs, ...] -> [outputs, ...]"""
        check_tensor("rows", rows, floating=None)
        if rows.dim() == 0 or rows.shape[0] != self.back.shape[0]:
            raise ValueError(
                f"rows: expected {self.back.shape[0]} of them, the number this layout was made "
                f"for, got shape {tuple(rows.shape)}"
            )
        return _Take.apply(rows, self.source, self.absent, self.back, self.unused, *self.rounds)


def row_map(source: torch.Tensor, inputs: int, device: torch.device) -> RowMap:
    """The map of `source`, an int64 index on the host with -1 for a row of zeros."""
    absent = (source < 0).nonzero()[:, 0]
    used = (source >= 0).nonzero()[:, 0]
    # Output rows grouped by the input row they copy, in their own order within it.
    grouped = used[source[used].argsort(stable=True)]
    uses = torch.bincount(source[used], minlength=inputs)
    starts = uses.cumsum(0) - uses
    order = uses.argsort(descending=True, stable=True)
    back = torch.empty(inputs, dtype=torch.int64)
    back[order] = torch.arange(inputs)
    rounds = []
    for use in range(int(uses.max()) if inputs else 0):
        with_it = order[: int((uses > use).sum())]
        rounds.append(to_device(grouped[starts[with_it] + use], device))
    unused = (uses == 0).nonzero()[:, 0]
    back[unused] = 0
    return RowMap(
        to_device(source.clamp(min=0), device),
        to_device(absent, device) if len(absent) else None,
        tuple(rounds),
        to_device(back, device),
        to_device(unused, device) if len(unused) else None,
    )


class _Take(Function):
    @staticmethod
    def forward(ctx, rows, source, absent, back, unused, *rounds):
        ctx.save_for_backward(source, absent, back, unused, *rounds)
        return _take(rows, source, absent)

    @staticmethod
    def backward(ctx, grad):
        layout = ctx.saved_tensors
        # The compiler takes no Function inside the backward of another, and no second derivative.
        add = _add if torch.compiler.is_compiling() else _Add.apply
        return add(grad, *layout), *(None,) * len(layout)


class _Add(Function):
    """The transpose of `_Take`."""

    @staticmethod
    def forward(ctx, grad, *layout):
        ctx.save_for_backward(*layout)
        return _add(grad, *layout)

    @staticmethod
    def backward(ctx, grad):
        layout = ctx.saved_tensors
        return _Take.apply(grad, *layout), *(None,) * len(layout)


def _take(rows, source, absent):
    if rows.shape[0] == 0:
        return rows.new_zeros(source.shape[0], *rows.shape[1:])
    out = rows.index_select(0, source)
    return out if absent is None else out.index_fill_(0, absent, 0)


def _add(grad, source, absent, back, unused, *rounds):
    if not rounds:  # no output row copies anything
        return grad.new_zeros(back.shape[0], *grad.shape[1:])
    total = grad.index_select(0, rounds[0])
    if len(rounds) > 1 and grad.dtype in (torch.bfloat16, torch.float16):
        total = total.float()
    for uses in rounds[1:]:
        total[: uses.shape[0]] += grad.index_select(0, uses)
    return _take(total, back, unused).to(grad.dtype)
