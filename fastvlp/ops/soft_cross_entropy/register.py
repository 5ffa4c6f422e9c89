"""The operators of soft cross entropy: the order of matmuls and passes within a workspace.

Rows are independent, so the logits of a chunk of rows are made whole, and one pass turns them into
losses and into derivatives with respect to the logits in place. Where the derivatives of all rows
fit, they stay in the workspace for the backward pass. Where they do not, rows are taken in groups:
if all losses will have the same weight upstream, each group's part of the gradients is computed at
once, to be multiplied by that weight; else the first group's derivatives stay, and the backward
pass makes those of the other groups again, one after another.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from ...kernels import storage_factor
from .. import compiled
from .._core.gpu_plan import TILE, even_chunks, rows_within
from .._core.implement import implement
from .._core.workspace import Workspace
from . import matmuls
from .checks import check_labels

# On a CPU. Keeps 824 rows of a vocabulary of 30,522 in float32, 1,648 in half precision.
DEFAULT_WORKSPACE_BYTES = 96 << 20
# Logits that exist at once besides the kept ones: fewer rows multiply slower (bench/NOTES.md).
_CHUNK_ROWS = 512
_CHUNK_BYTES = 64 << 20
# On a GPU, float32 logits that exist at once: 512 rows of two models with a vocabulary of 30,522.
_GPU_CHUNK_BYTES = 128 << 20
_SINGLE = torch.float32


@dataclass(frozen=True)
class Plan:
    """Rows of logits made at a time, and rows whose gradients the workspace holds."""

    chunk_rows: int
    group_rows: int
    group_floats: int


def plan_for(
    hidden: torch.Tensor, cols: int, has_teacher: bool, workspace_bytes: int | None
) -> Plan:
    """Cuts the logits of `hidden` [M, D] against a vocabulary of `cols`, for its device.

    `workspace_bytes` None: as much memory as suits the device.
    """
    rows, dtype = hidden.shape[0], matmuls.matmul_dtype(hidden)
    if hidden.is_cuda:
        heads = 2 if has_teacher else 1
        return make_gpu_plan(rows, cols, dtype, heads, workspace_bytes, hidden.device)
    budget = DEFAULT_WORKSPACE_BYTES if workspace_bytes is None else workspace_bytes
    return make_plan(rows, cols, dtype, budget)


def make_gpu_plan(
    rows: int,
    cols: int,
    dtype: torch.dtype,
    heads: int,
    workspace_bytes: int | None,
    device: torch.device,
) -> Plan:
    """Groups of rows whose gradients memory holds, in chunks whose logits, fp32 and of `heads`
    models, exist at once.

    Chunks that stayed in the L2 cache would be a quarter as high: each would read the weights
    again, and have one row for each multiprocessor, whose latency nothing hides
    (docs/gpu_model.md). float32 logits of the student lie where their gradients will, and are made
    for a group at once.
    """
    logits_bytes = matmuls.row_length(cols, _SINGLE) * _SINGLE.itemsize * heads
    gradient_bytes = matmuls.row_length(cols, dtype) * dtype.itemsize
    chunk = max(TILE, _GPU_CHUNK_BYTES // logits_bytes // TILE * TILE)
    if workspace_bytes is not None:
        chunk = max(1, min(chunk, workspace_bytes // 3 // logits_bytes))
    most = rows_within(workspace_bytes, gradient_bytes, chunk * logits_bytes, device)
    group = max(1, even_chunks(rows, max(1, most)))
    return Plan(min(chunk, group), group, group * gradient_bytes // 4)


def make_plan(rows: int, cols: int, dtype: torch.dtype, workspace_bytes: int) -> Plan:
    """Cuts [rows, cols] logits on a CPU, whose gradients are kept in `dtype`; one row at least."""
    length = matmuls.row_length(cols, dtype)
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
    def weight_for_matmul(self) -> torch.Tensor:
        """On a GPU rounded as a whole to the matmuls' dtype; on a CPU block by block, later."""
        return self.weight.to(self.hidden.dtype) if matmuls.on_gpu(self.hidden) else self.weight

    def logits_dtype(self) -> torch.dtype:
        return matmuls.logits_dtype(self.hidden)


@dataclass(frozen=True)
class Problem:
    student: Head
    teacher: Head | None
    labels: torch.Tensor
    alpha: torch.Tensor
    ignore_index: int
    chunk_rows: int

    def check_labels(self) -> None:
        """Raises ValueError, on a CPU, where one is neither a word nor ignore_index."""
        check_labels(self.labels, len(self.student.weight), self.ignore_index)

    def write_losses(
        self,
        rows: slice,
        losses: torch.Tensor,
        storage: torch.Tensor | None = None,
        has_gradient: bool = False,
    ) -> None:
        """Writes the losses [M] of some rows and, with `has_gradient`, their derivatives.

        `storage` [rows, V] is in the matmuls' dtype and takes the derivatives with respect to the
        logits. Where logits have that dtype they are made in it, all rows in one matmul; else, and
        without storage, chunk after chunk in scratch. The bits of a matmul depend on its size.
        """
        cols = len(self.student.weight)
        chunk = min(self.chunk_rows, _len(rows))
        in_place = storage is not None and storage.dtype == self.student.logits_dtype()
        own = None if in_place else _scratch(self.student, chunk, cols)
        other = None if self.teacher is None else _scratch(self.teacher, chunk, cols)
        if in_place:
            matmuls.logits(_of(self.student.hidden, rows), self.student.weight_for_matmul, storage)
        for start in range(rows.start, rows.stop, self.chunk_rows):
            part = slice(start, min(rows.stop, start + self.chunk_rows))
            local = slice(start - rows.start, part.stop - rows.start)
            stored = None if storage is None else _of(storage, local)
            if in_place:
                logits = stored
            else:
                logits = own[: _len(part)]
                hidden = _of(self.student.hidden, part)
                matmuls.logits(hidden, self.student.weight_for_matmul, logits)
            self._pass(part, logits, other, _of(losses, part), stored if has_gradient else None)

    def _pass(self, part, logits, teacher_logits, losses, gradient):
        none = logits.new_empty(0, 0)
        if self.teacher is not None:
            teacher_logits = teacher_logits[: _len(part)]
            hidden = _of(self.teacher.hidden, part)
            matmuls.logits(hidden, self.teacher.weight_for_matmul, teacher_logits)
        _pass(logits)(
            logits,
            _bias(self.student),
            none if self.teacher is None else teacher_logits,
            _bias(self.teacher or self.student),
            _of(self.labels, part),
            self.alpha,
            self.ignore_index,
            losses,
            none if gradient is None else gradient,
        )


def _len(rows: slice) -> int:
    return rows.stop - rows.start


def _of(t: torch.Tensor, rows: slice) -> torch.Tensor:
    """t[rows], and no view where these are all of its rows."""
    return t if _len(rows) == t.shape[0] else t[rows]


def _scratch(head: Head, rows: int, cols: int) -> torch.Tensor:
    dtype = head.logits_dtype()
    length = matmuls.row_length(cols, dtype)
    whole = head.hidden.new_empty((rows, length), dtype=dtype)
    if matmuls.on_gpu(whole):
        whole[:, cols:].zero_()  # the pass reads by vectors, beyond the last column
    return whole[:, :cols]


def _bias(head: Head) -> torch.Tensor:
    return head.hidden.new_empty(0, dtype=_SINGLE) if head.bias is None else head.bias


def _pass(logits: torch.Tensor) -> Callable[..., None]:
    if not matmuls.on_gpu(logits):
        return torch.ops.fastvlp.soft_cross_entropy_rows
    from ...kernels.soft_cross_entropy import soft_cross_entropy_rows

    return soft_cross_entropy_rows


def _problem(
    hidden, weight, bias, labels, teacher_hidden, teacher_weight, teacher_bias, alpha,
    ignore_index, chunk_rows,
) -> Problem:  # fmt: skip
    teacher = None
    if teacher_hidden is not None:
        teacher = Head(teacher_hidden, teacher_weight, teacher_bias)
    return Problem(Head(hidden, weight, bias), teacher, labels, alpha, ignore_index, chunk_rows)


def _losses(*arguments):
    *inputs, kept, group_rows, chunk_rows, has_gradient, is_uniform = arguments
    problem = _problem(*inputs, chunk_rows)
    problem.check_labels()
    hidden = problem.student.hidden
    losses = hidden.new_empty(len(hidden), dtype=_SINGLE)
    for part in _groups(len(hidden), group_rows):
        # The same matmuls with and without gradients, so that the losses are the same bits. The
        # first group's derivatives stay for the backward pass: no later group takes their place.
        is_kept = kept.numel() > 0 and (part.start == 0 or (is_uniform and not has_gradient))
        storage = _kept_gradient(problem, kept, _len(part)) if is_kept else None
        problem.write_losses(part, losses, storage, has_gradient)
    return losses


def kept_floats(hidden: torch.Tensor, plan: Plan, has_gradient: bool) -> int:
    """The storage that the losses of one plan need: a group's derivatives, or only its logits."""
    if has_gradient or matmuls.logits_dtype(hidden) == matmuls.matmul_dtype(hidden):
        return plan.group_floats
    return 0


def _kept_gradient(problem: Problem, kept: torch.Tensor, rows: int) -> torch.Tensor:
    student = problem.student
    dtype = matmuls.matmul_dtype(student.hidden)
    return matmuls.matrix(kept, rows, len(student.weight), dtype)


def _gradients(hidden, weight, *arguments):
    *inputs, row_weights, kept, is_kept, group_rows, chunk_rows, needed = arguments
    rows = len(hidden)
    if rows == 0:
        return tuple(t.zero_() for t in _empty_gradients(hidden, weight, needed))
    problem = _problem(hidden, weight, *inputs, chunk_rows)
    if not is_kept or group_rows < rows:  # else nothing looks at the labels any more
        problem.check_labels()
    sums = _Sums(problem, needed, hidden.dtype, weight.dtype if group_rows >= rows else _SINGLE)
    for part in _groups(rows, group_rows):
        gradient = _kept_gradient(problem, kept, _len(part))
        if part.start > 0 or not is_kept:
            problem.write_losses(part, hidden.new_empty(rows, dtype=_SINGLE), gradient, True)
        sums.add(part, gradient, _of(row_weights, part))
    d_hidden, d_weight, d_bias = sums.gradients()
    return d_hidden, d_weight.to(weight.dtype), d_bias


def _losses_and_gradients(hidden, weight, *arguments):
    *inputs, group_rows, chunk_rows, needed = arguments
    rows = len(hidden)
    problem = _problem(hidden, weight, *inputs, chunk_rows)
    problem.check_labels()
    losses = hidden.new_empty(rows, dtype=_SINGLE)
    # float32, since the weight upstream is still to come: it may well be the scale of half
    # precision gradients.
    sums = _Sums(problem, needed, _SINGLE, _SINGLE)
    length = matmuls.row_length(len(weight), matmuls.matmul_dtype(hidden))
    floats = group_rows * length * matmuls.matmul_dtype(hidden).itemsize // 4
    workspace = None if matmuls.on_gpu(hidden) else Workspace(floats)
    storage = losses.new_empty(floats) if workspace is None else workspace.floats
    for part in _groups(rows, group_rows):
        gradient = _kept_gradient(problem, storage, _len(part))
        problem.write_losses(part, losses, gradient, True)
        sums.add(part, gradient, losses.new_ones(()).expand(_len(part)))
    return losses, *sums.gradients()


def _groups(rows: int, group_rows: int) -> Iterator[slice]:
    for start in range(0, rows, group_rows):
        yield slice(start, min(rows, start + group_rows))


class _Sums:
    """Gradients with respect to hidden, weight and bias, from one group of rows after another."""

    def __init__(self, problem: Problem, needed, hidden_dtype, weight_dtype):
        self._problem, self._needed = problem, needed
        self._hidden_dtype, self._weight_dtype = hidden_dtype, weight_dtype
        self._d_hidden, self._d_weight, self._d_bias = [], None, None

    def add(self, part: slice, gradient: torch.Tensor, row_weights: torch.Tensor) -> None:
        """The rows `part`, given the derivatives of their logits and their weights upstream."""
        student = self._problem.student
        stored = storage_factor(gradient.dtype)
        factor, relative = _split(row_weights, stored)
        if self._needed[0]:
            found = matmuls.hidden_gradient(gradient, student.weight_for_matmul, factor)
            self._d_hidden.append(_scaled(found, relative, self._hidden_dtype))
        if self._needed[1]:
            own = _scaled(_of(student.hidden, part), relative, student.hidden.dtype)
            self._d_weight = matmuls.weight_gradient(
                gradient, own, factor, self._weight_dtype, self._d_weight
            )
        if self._needed[2]:
            found = matmuls.bias_gradient(gradient, row_weights / stored, factor, relative)
            self._d_bias = found if self._d_bias is None else self._d_bias.add_(found)

    def gradients(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What has been added up; [0] where it is not needed."""
        student = self._problem.student
        found = _joined(self._d_hidden), self._d_weight, self._d_bias
        if all(f is not None for f in found):
            return found
        nothing = _empty_gradients(student.hidden, student.weight, [False] * 3)
        return tuple(n if f is None else f for f, n in zip(found, nothing, strict=True))


def _joined(parts: list[torch.Tensor]) -> torch.Tensor | None:
    return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else None


def _scaled(rows: torch.Tensor, factors: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    return (rows if factors is None else rows * factors[:, None]).to(dtype)


def _split(row_weights: torch.Tensor, stored: float) -> tuple[matmuls.Factor, torch.Tensor | None]:
    """row_weights / stored = factor * relative, |relative| <= 1; None where it is 1 throughout."""
    is_expanded = len(row_weights) == 1 or row_weights.stride(0) == 0  # one value for all rows
    if is_expanded and not matmuls.on_gpu(row_weights):
        return row_weights[0].item() / stored, None
    largest = row_weights.abs().amax()
    if matmuls.on_gpu(row_weights):
        return largest / stored, row_weights / torch.where(largest == 0, 1, largest)
    if (row_weights == row_weights[0]).all() or largest == 0:
        return row_weights[0].item() / stored, None
    return largest.item() / stored, row_weights / largest


def _empty_gradients(hidden, weight, needed, dtype=None):
    def empty(like, *shape, wanted, dtype=dtype):
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


def _losses_and_gradients_fake(hidden, weight, *arguments):
    gradients = _empty_gradients(hidden, weight, arguments[-1], _SINGLE)
    return _losses_fake(hidden), *gradients


def register_operators() -> None:
    """Called once when `fastvlp.ops` is imported; does nothing where there are no schemas."""
    if compiled.missing_schemas():
        return
    for name, implementation, fake in (
        ("soft_cross_entropy_losses", _losses, _losses_fake),
        ("soft_cross_entropy_gradients", _gradients, _gradients_fake),
        (
            "soft_cross_entropy_losses_and_gradients",
            _losses_and_gradients,
            _losses_and_gradients_fake,
        ),
    ):
        torch.library.register_fake(f"fastvlp::{name}", fake)
        implement(name, implementation, "CPU", "CUDA")
    torch.library.register_fake("fastvlp::soft_cross_entropy_rows", lambda *_: None)
    torch.library.register_fake(
        "fastvlp::soft_cross_entropy_column_sums", lambda m, w: w.new_empty(m.shape[1])
    )
    torch.library.register_fake(
        "fastvlp::soft_cross_entropy_weight_gradient",
        lambda gradient, hidden, like, factor: like.new_empty(gradient.shape[1], hidden.shape[1]),
    )
