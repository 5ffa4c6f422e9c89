"""The operators of soft cross entropy: the order of products and passes within a workspace.

Rows are independent, so the logits of a chunk of rows are made whole, and one pass turns them into
losses and into derivatives by the logits in place. Those of the first group of rows stay in the
workspace for the backward pass; where there are more rows than fit, the backward pass makes the
other groups' again, one after another.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from .. import _native
from . import _soft_cross_entropy_products as products
from ._contrastive_cuda import storage_factor

# Logits that exist at once beside the kept ones: fewer rows multiply slower (bench/NOTES.md).
_CHUNK_ROWS = 512
_CHUNK_BYTES = 64 << 20
_SINGLE = torch.float32


@dataclass(frozen=True)
class Plan:
    """Rows of logits made at a time, and rows whose gradients the workspace holds."""

    chunk_rows: int
    group_rows: int
    group_floats: int


def make_plan(rows: int, cols: int, dtype: torch.dtype, workspace_bytes: int) -> Plan:
    """Cuts [rows, cols] logits whose gradients are kept in `dtype`. At least one row is kept."""
    length = products.row_length(cols, dtype)
    row_bytes = length * dtype.itemsize
    group, scratch_bytes = rows, _CHUNK_BYTES
    if rows * row_bytes > workspace_bytes:
        # The logits made again take room too, at the time when memory is at its highest.
        scratch_bytes = min(_CHUNK_BYTES, workspace_bytes // 3)
        group = _even(rows, (workspace_bytes - scratch_bytes) // row_bytes)
    group = max(1, group)
    chunk = _even(group, min(_CHUNK_ROWS, scratch_bytes // row_bytes))
    return Plan(chunk, group, group * row_bytes // 4)


def _even(count: int, most: int) -> int:
    """The size of the fewest parts of `count` that are at most `most` (at least 1) each."""
    return -(-count // -(-count // max(1, most)))


@dataclass(frozen=True)
class Head:
    """hidden [M, D], weight [V, D], bias [V] fp32 or None."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None

    @cached_property
    def weight_in_products(self) -> torch.Tensor:
        """On a GPU rounded as a whole to the products' dtype; on a CPU block by block, later."""
        return self.weight.to(self.hidden.dtype) if self.hidden.is_cuda else self.weight

    def logits_dtype(self) -> torch.dtype:
        return _SINGLE if self.hidden.is_cuda else products.products_dtype(self.hidden)


@dataclass(frozen=True)
class Problem:
    student: Head
    teacher: Head | None
    labels: torch.Tensor
    alpha: torch.Tensor
    ignore_index: int
    chunk_rows: int

    def write_losses(
        self, rows: slice, losses: torch.Tensor, gradient: torch.Tensor | None
    ) -> None:
        """Writes the losses [M] of some rows and, where wanted, their derivatives by the logits.

        `gradient` [rows, V] is in the products' dtype.
        """
        cols = len(self.student.weight)
        chunk = min(self.chunk_rows, _len(rows))
        in_place = gradient is not None and gradient.dtype == self.student.logits_dtype()
        own = None if in_place else _scratch(self.student, chunk, cols)
        other = None if self.teacher is None else _scratch(self.teacher, chunk, cols)
        if in_place:
            products.logits(self.student.hidden[rows], self.student.weight_in_products, gradient)
        for start in range(rows.start, rows.stop, self.chunk_rows):
            part = slice(start, min(rows.stop, start + self.chunk_rows))
            out = None if gradient is None else gradient[start - rows.start :][: _len(part)]
            if in_place:
                logits = out
            else:
                logits = own[: _len(part)]
                products.logits(self.student.hidden[part], self.student.weight_in_products, logits)
            self._pass(part, logits, other, losses[part], out)

    def _pass(self, part, logits, teacher_logits, losses, gradient):
        none = logits.new_empty(0, 0)
        if self.teacher is not None:
            teacher_logits = teacher_logits[: _len(part)]
            products.logits(
                self.teacher.hidden[part], self.teacher.weight_in_products, teacher_logits
            )
        _pass(logits)(
            logits,
            _bias(self.student),
            none if self.teacher is None else teacher_logits,
            _bias(self.teacher or self.student),
            self.labels[part],
            self.alpha,
            self.ignore_index,
            losses,
            none if gradient is None else gradient,
        )


def _len(rows: slice) -> int:
    return rows.stop - rows.start


def _scratch(head: Head, rows: int, cols: int) -> torch.Tensor:
    dtype = head.logits_dtype()
    length = products.row_length(cols, dtype)
    return head.hidden.new_empty((rows, length), dtype=dtype)[:, :cols]


def _bias(head: Head) -> torch.Tensor:
    return head.hidden.new_empty(0, dtype=_SINGLE) if head.bias is None else head.bias


def _pass(logits: torch.Tensor) -> Callable[..., None]:
    if not logits.is_cuda:
        return torch.ops.fastvlp.soft_cross_entropy_rows
    from ..kernels.soft_cross_entropy import soft_cross_entropy_rows

    return soft_cross_entropy_rows


def _problem(
    hidden, weight, bias, labels, teacher_hidden, teacher_weight, teacher_bias, alpha,
    ignore_index, chunk_rows,
) -> Problem:  # fmt: skip
    teacher = None
    if teacher_hidden is not None:
        teacher = Head(teacher_hidden, teacher_weight, teacher_bias)
    check_labels(labels, len(weight), ignore_index)
    return Problem(Head(hidden, weight, bias), teacher, labels, alpha, ignore_index, chunk_rows)


def check_labels(labels: torch.Tensor, cols: int, ignore_index: int) -> None:
    """Raises ValueError naming the first bad label; on a GPU its loss becomes NaN instead."""
    if labels.device.type != "cpu":
        return
    bad = ((labels < 0) | (labels >= cols)) & (labels != ignore_index)
    if bad.any():
        where = bad.nonzero()[0].tolist()
        at = ", ".join(map(str, where))
        raise ValueError(
            f"labels: expected 0 to {cols - 1} or ignore_index {ignore_index}, got "
            f"{labels[tuple(where)].item()} at [{at}]"
        )


def _without_autocast(function):
    # The products' dtype is decided here; autocast would round float32 operands once more.
    def run(hidden, *arguments):
        with torch.autocast(hidden.device.type, enabled=False):
            return function(hidden, *arguments)

    return run


@_without_autocast
def _losses(*arguments):
    *inputs, kept, group_rows, chunk_rows = arguments
    problem = _problem(*inputs, chunk_rows)
    hidden = problem.student.hidden
    rows, group = len(hidden), 0
    losses = hidden.new_empty(rows, dtype=_SINGLE)
    if kept.numel() > 0:
        group = min(rows, group_rows)
        problem.write_losses(slice(0, group), losses, _kept_gradient(problem, kept, group))
    if group < rows:
        problem.write_losses(slice(group, rows), losses, None)
    return losses


def _kept_gradient(problem: Problem, kept: torch.Tensor, rows: int) -> torch.Tensor:
    student = problem.student
    dtype = products.products_dtype(student.hidden)
    return products.matrix(kept, rows, len(student.weight), dtype)


@_without_autocast
def _gradients(hidden, weight, *arguments):
    *inputs, row_weights, kept, is_kept, group_rows, chunk_rows, needed = arguments
    rows = len(hidden)
    if rows == 0:
        return tuple(t.zero_() for t in _empty_gradients(hidden, weight, needed))
    problem = _problem(hidden, weight, *inputs, chunk_rows)
    sums_dtype = weight.dtype if group_rows >= rows else _SINGLE
    by_hidden, by_weight, by_bias = [], None, None
    for start in range(0, rows, group_rows):
        part = slice(start, min(rows, start + group_rows))
        gradient = _kept_gradient(problem, kept, _len(part))
        if start > 0 or not is_kept:
            problem.write_losses(part, hidden.new_empty(rows, dtype=_SINGLE), gradient)
        stored = storage_factor(gradient.dtype)
        factor, relative = _split(row_weights[part], stored)
        if needed[0]:
            found = products.hidden_gradient(gradient, problem.student.weight_in_products, factor)
            by_hidden.append(_scaled(found, relative, hidden.dtype))
        if needed[1]:
            own = _scaled(hidden[part], relative, hidden.dtype)
            by_weight = products.weight_gradient(gradient, own, factor, sums_dtype, by_weight)
        if needed[2]:
            found = products.bias_gradient(gradient, row_weights[part] / stored)
            by_bias = found if by_bias is None else by_bias.add_(found)
    nothing = _empty_gradients(hidden, weight, [False] * 3)
    return (
        torch.cat(by_hidden) if needed[0] else nothing[0],
        by_weight.to(weight.dtype) if needed[1] else nothing[1],
        by_bias if needed[2] else nothing[2],
    )


def _scaled(rows: torch.Tensor, factors: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    return (rows if factors is None else rows * factors[:, None]).to(dtype)


def _split(row_weights: torch.Tensor, stored: float) -> tuple[products.Factor, torch.Tensor | None]:
    """row_weights / stored = factor * relative, |relative| <= 1; None where it is 1 throughout."""
    largest = row_weights.abs().amax()
    if row_weights.is_cuda:
        return largest / stored, row_weights / torch.where(largest == 0, 1, largest)
    if (row_weights == row_weights[0]).all() or largest == 0:
        return row_weights[0].item() / stored, None
    return largest.item() / stored, row_weights / largest


def _empty_gradients(hidden, weight, needed):
    def empty(like, *shape, wanted, dtype=None):
        return like.new_empty(shape if wanted else [0, *shape[1:]], dtype=dtype)

    return (
        empty(hidden, *hidden.shape, wanted=needed[0]),
        empty(weight, *weight.shape, wanted=needed[1]),
        empty(weight, len(weight), wanted=needed[2], dtype=_SINGLE),
    )


def _losses_fake(hidden, *_):
    return hidden.new_empty(hidden.shape[0], dtype=_SINGLE)


def _gradients_fake(hidden, weight, *arguments):
    return _empty_gradients(hidden, weight, arguments[-1])


def register() -> None:
    """Called once when `fastvlp.ops` is imported; does nothing where the library is missing."""
    if _native.load():
        return
    for name, implementation, fake in (
        ("soft_cross_entropy_losses", _losses, _losses_fake),
        ("soft_cross_entropy_gradients", _gradients, _gradients_fake),
    ):
        torch.library.register_fake(f"fastvlp::{name}", fake)
        torch.library.impl(f"fastvlp::{name}", ("CPU", "CUDA"), implementation)
    torch.library.register_fake("fastvlp::soft_cross_entropy_rows", lambda *_: None)
    torch.library.register_fake(
        "fastvlp::soft_cross_entropy_column_sums", lambda m, w: w.new_empty(m.shape[1])
    )
