"""A vocabulary head and its cross entropy, with an optional teacher, without all the logits."""

import torch
import torch.nn.functional as F

from ..._autograd import Function
from .._core.backends import native_on_cpu
from .._core.checks import check_tensor, check_workspace, readable
from .._core.dispatch import choose, register_backends
from .._core.implement import without_autocast
from .._core.workspace import Workspace
from ..autocast import as_autocast
from . import matmuls
from .checks import (
    CANDIDATES,
    are_words,
    check_head,
    check_labels,
    check_labels_tensor,
    check_teacher,
)
from .register import kept_floats, plan_for, register_operators

REDUCTIONS = ("mean", "sum", "none")


def soft_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    *,
    teacher_hidden: torch.Tensor | None = None,
    teacher_weight: torch.Tensor | None = None,
    teacher_bias: torch.Tensor | None = None,
    alpha: torch.Tensor | float = 0.0,
    ignore_index: int = -100,
    max_rows: int | None = None,
    reduction: str = "mean",
    workspace_bytes: int | None = None,
) -> torch.Tensor:
    """Cross entropy of hidden @ weight.T + bias against labels and against a teacher's softmax.

        z = h E^T + b,  p = softmax(z),  p' = softmax(h' E'^T + b')
        loss_i = (1 - a) (-log p_i[y_i]) + a (-sum_j p'_ij log p_ij)

    Rows whose label is `ignore_index` are left out before anything is computed; `reduction="mean"`
    is the mean over the others, and 0 where there are none. Differentiable once w.r.t. h, E and b;
    the teacher, its weights and `a` get no gradient. A token that the teacher rules out (p' = 0)
    adds nothing, even where the student's logit is -infinity.

    Source: the masked language modelling head of Devlin et al., "BERT", arXiv 1810.04805, section
    3.1, and its distillation from a momentum model in Li et al., "Align before Fuse", arXiv
    2107.07651, section 3.3, equation 7.

    Cost, for M rows, width D and vocabulary V: matmuls of 2 M D V FLOP, one each forward (two with
    a teacher) and two backward. The derivatives of all M V logits are kept between the two in the
    dtype of the matmuls, where they fit into `workspace_bytes`; besides these at most 64 MB of the
    teacher's logits exist at a time (on a GPU at most 128 MiB of all float32 logits, or 128 rows).
    For a larger M, logits and derivatives of a group of rows share the workspace, and "mean" and
    "sum" compute the gradients in the forward pass, as float32, so that the backward pass has but a
    multiplication left. "none" cannot, not knowing the weight of each row: it makes the logits of
    all groups but the first again, one or two matmuls more for them. Without gradients the logits
    of a group take the same room, and the losses are the same bits.

    Precision: softmax, sums and losses are float32 or better. float32 inputs have float32 matmuls.
    On a CPU bfloat16 inputs have bfloat16 matmuls with float32 sums where the CPU has them, and
    logits rounded to bfloat16 as `F.linear` rounds them; else, for float16, and for up to 32 rows
    against float32 weights, matmuls are float32. On a GPU half precision matmuls give float32
    logits.

    Args:
        hidden: [.., D], float32, bfloat16 or float16 (float64 through the reference). Under
            torch.autocast it is rounded as `F.linear` would.
        weight: [V, D], the dtype of hidden, or float32 master weights with half precision hidden.
        bias: [V], any floating dtype, or None.
        labels: [..], int64 or int32: 0 to V - 1, or ignore_index.
        teacher_hidden: [.., D'], of its own dtype and width if need be; None: no teacher.
        teacher_weight: [V, D'], as weight.
        teacher_bias: [V] or None.
        alpha: weight of the teacher, 0 to 1: a number, or a tensor of one element on the device
            (a GPU's is not looked at).
        ignore_index: the label of rows to leave out.
        max_rows: an upper bound of the number of labelled rows, see `select_rows`. Without it
            they are counted, which on a GPU waits for the device; and torch.compile, which cannot
            count, computes the ignored rows too and gives them no weight.
        reduction: "mean" over the labelled rows, "sum", or "none" ([..], 0 at ignored rows).
        workspace_bytes: bound on the derivatives of logits kept for the backward pass; less of it
            than for all rows is shared with the logits that exist at a time. None: 96 MB on a CPU;
            on a GPU 2.5 to 5% of the memory that is free at the first call, or more if 4,096 rows
            take more.

    Returns:
        float32 (float64 for float64), zero-dimensional, or [..] for "none".

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it, and the row
            of a label out of range. (A GPU cannot raise: there such a row's loss is NaN.)
        RuntimeError: FASTVLP_BACKEND forces an implementation that cannot run, or a second
            derivative is asked for.

    Examples:
        >>> import torch
        >>> from fastvlp.ops import soft_cross_entropy
        >>> hidden, weight = torch.randn(2, 6, 16, requires_grad=True), torch.randn(50, 16)
        >>> labels = torch.full((2, 6), -100)
        >>> labels[0, 3] = 17
        >>> soft_cross_entropy(hidden, weight, None, labels).backward()
        >>> hidden.grad[1].count_nonzero()
        tensor(0)
    """
    hidden, teacher_hidden = as_autocast(hidden, teacher_hidden)
    check_head("", hidden, weight, bias)
    check_labels_tensor(labels, hidden)
    check_teacher(hidden, teacher_hidden, teacher_weight, teacher_bias, alpha, weight.shape[0])
    check_workspace(workspace_bytes)
    _check_options(ignore_index, max_rows, reduction)
    if not isinstance(alpha, torch.Tensor) and alpha == 0:
        teacher_hidden = teacher_weight = teacher_bias = None
    teacher = [
        None if t is None else t.detach() for t in (teacher_hidden, teacher_weight, teacher_bias)
    ]
    backend = choose("soft_cross_entropy", hidden, weight)
    vocabulary = weight.shape[0]
    # One look at the labels in place of several: most callers have chosen the labelled rows.
    can_look = readable(labels) and labels.numel() > 0 and not 0 <= ignore_index < vocabulary
    is_whole = can_look and are_words(labels, vocabulary)
    if not is_whole and not torch.compiler.is_compiling():
        check_labels(labels, vocabulary, ignore_index)
    if backend == "reference":
        return without_autocast(soft_cross_entropy_reference)(
            hidden, weight, bias, labels, teacher_hidden=teacher_hidden,
            teacher_weight=teacher_weight, teacher_bias=teacher_bias, alpha=alpha,
            ignore_index=ignore_index, reduction=reduction,
        )  # fmt: skip
    if is_whole and max_rows is None:
        rows = None
    else:
        rows = _labelled_rows(labels, ignore_index, max_rows)
    chosen = labels.reshape(-1) if rows is None else _take_labels(labels, rows, ignore_index)
    losses = _row_losses(
        hidden, weight, bias, chosen.long(), teacher, alpha, ignore_index, rows, workspace_bytes,
        is_uniform=reduction != "none",
    )  # fmt: skip
    if reduction == "sum":
        return losses.sum()
    if reduction == "mean":
        if max_rows is None and not torch.compiler.is_compiling():  # all of these are labelled
            return losses.sum() / max(1, len(chosen))
        return losses.sum() / (chosen != ignore_index).sum().clamp(min=1)
    if rows is not None:
        losses = losses.new_zeros(labels.numel()).index_put((rows,), losses)
    return losses.reshape(labels.shape)


def _check_options(ignore_index, max_rows, reduction):
    if not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: expected an int, got {type(ignore_index).__name__}")
    if max_rows is not None and (not isinstance(max_rows, int) or max_rows < 0):
        raise ValueError(f"max_rows: expected a number of rows or None, got {max_rows!r}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {REDUCTIONS}, got {reduction!r}")


def _row_losses(
    hidden, weight, bias, labels, teacher, alpha, ignore_index, rows, workspace_bytes, is_uniform
):  # fmt: skip
    """Losses of the chosen rows (None: of all), which have these labels.

    `is_uniform`: the caller gives every loss the same weight.
    """
    hidden, teacher_hidden = (None if t is None else _take(t, rows) for t in (hidden, teacher[0]))
    hidden = matmuls.in_few_rows(hidden, weight)
    if teacher_hidden is not None:
        teacher_hidden = matmuls.in_few_rows(teacher_hidden, teacher[1])
    if not isinstance(alpha, torch.Tensor):
        alpha = torch.full((), float(alpha), device=hidden.device)
    return _SoftCrossEntropy.apply(
        hidden, weight, None if bias is None else bias.float(), labels, teacher_hidden,
        teacher[1], None if teacher[2] is None else teacher[2].float(),
        alpha.detach().reshape(()).float(), ignore_index, workspace_bytes,
        torch.is_grad_enabled(), is_uniform,
    )  # fmt: skip


def select_rows(
    labels: torch.Tensor,
    *hidden: torch.Tensor,
    ignore_index: int = -100,
    max_rows: int | None = None,
) -> tuple[torch.Tensor, ...]:
    """The labelled rows: labels [..] and every hidden [.., D] become [K] and [K, D].

    With `max_rows` K is that number (or that of all rows), nothing waits for a GPU and
    torch.compile sees a fixed shape; rows to spare have the label ignore_index. Where more rows
    are labelled than `max_rows`, a ValueError says so on a CPU; on a GPU, and in compiled code,
    all labels are made invalid, so that the loss is NaN rather than silently that of fewer rows.
    Without `max_rows` K is counted, on a GPU by waiting for it. Does nothing where all rows are
    labelled.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """
    check_tensor("labels", labels, floating=False)
    for i, t in enumerate(hidden):
        check_tensor(f"hidden[{i}]", t)
        if t.shape[:-1] != labels.shape or t.dim() == 0:
            raise ValueError(
                f"hidden[{i}]: expected [.., D] with the rows {tuple(labels.shape)} of labels, got "
                f"shape {tuple(t.shape)}"
            )
    _check_options(ignore_index, max_rows, "none")
    rows = _labelled_rows(labels, ignore_index, max_rows)
    if rows is None:
        return labels.reshape(-1), *(_take(t, None) for t in hidden)
    return _take_labels(labels, rows, ignore_index), *(_take(t, rows) for t in hidden)


def _labelled_rows(labels, ignore_index, max_rows) -> torch.Tensor | None:
    """Indices of the labelled rows (with `max_rows`, then of others), or None for all rows."""
    labelled = labels.reshape(-1) != ignore_index
    if max_rows is not None:
        if not torch.compiler.is_compiling() and labels.device.type == "cpu":
            if (count := int(labelled.sum())) > max_rows:
                raise ValueError(
                    f"max_rows: expected at least the {count} labelled rows, got {max_rows}"
                )
        # Labelled rows first, each kind in its own order.
        return (~labelled).int().argsort(stable=True)[:max_rows]
    if torch.compiler.is_compiling() or bool(labelled.all()):
        return None
    return labelled.nonzero().squeeze(1)


def _take(hidden: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    hidden = hidden.reshape(-1, hidden.shape[-1])
    return hidden if rows is None else hidden.index_select(0, rows)


def _take_labels(labels: torch.Tensor, rows: torch.Tensor, ignore_index: int) -> torch.Tensor:
    labels = labels.reshape(-1)
    invalid = -1 if ignore_index != -1 else -2
    too_many = (labels != ignore_index).sum() > rows.numel()
    return torch.where(too_many, invalid, labels[rows])


def soft_cross_entropy_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    *,
    teacher_hidden: torch.Tensor | None = None,
    teacher_weight: torch.Tensor | None = None,
    teacher_bias: torch.Tensor | None = None,
    alpha: torch.Tensor | float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    """The definition of `soft_cross_entropy`: any floating dtype, memory for M V logits."""
    labelled = labels != ignore_index
    targets = labels[labelled].long()

    def log_softmax(hidden, weight, bias):
        hidden = hidden[labelled]
        bias = None if bias is None else bias.to(hidden.dtype)
        logits = F.linear(hidden, weight.to(hidden.dtype), bias)
        return F.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), -1)

    log_p = log_softmax(hidden, weight, bias)
    losses = -log_p.gather(1, targets[:, None]).squeeze(1)
    if teacher_hidden is not None:
        with torch.no_grad():
            teacher = log_softmax(teacher_hidden, teacher_weight, teacher_bias).exp()
        soft = -torch.where(teacher == 0, 0, teacher * log_p).sum(1)
        losses = (1 - alpha) * losses + alpha * soft
    if reduction == "none":
        return losses.new_zeros(labels.shape).masked_scatter(labelled, losses)
    return losses.sum() if reduction == "sum" else losses.sum() / max(len(targets), 1)


class _SoftCrossEntropy(Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, *arguments):
        *teacher, alpha, ignore_index, workspace_bytes, has_backward, is_uniform = arguments
        inputs = (hidden, weight, bias, labels, *teacher, alpha)
        plan = plan_for(hidden, weight.shape[0], teacher[0] is not None, workspace_bytes)
        needed = ctx.needs_input_grad[:3] if has_backward else (False,) * 3
        ctx.plan, ctx.ignore_index, ctx.workspace = plan, ignore_index, None
        ctx.is_early = is_uniform and any(needed) and plan.group_rows < hidden.shape[0]
        compiling = torch.compiler.is_compiling()
        if ctx.is_early:
            losses, *made = torch.ops.fastvlp.soft_cross_entropy_losses_and_gradients(
                *inputs, ignore_index, plan.group_rows, plan.chunk_rows, list(needed)
            )
        else:
            has_gradient = any(needed)
            floats = kept_floats(hidden, plan, has_gradient)
            # The compiler plans memory itself, and on a GPU torch's allocator keeps it.
            if compiling or hidden.device.type != "cpu":
                made = [hidden.new_empty(floats, dtype=torch.float32)]
            else:
                ctx.workspace = Workspace(floats)
                made = [ctx.workspace.floats]
            losses = torch.ops.fastvlp.soft_cross_entropy_losses(
                *inputs, ignore_index, *made, plan.group_rows, plan.chunk_rows, has_gradient,
                is_uniform,
            )  # fmt: skip
        # The first backward pass overwrites it; compiled code works on copies.
        ctx.made = None if compiling else made
        ctx.save_for_backward(*inputs, *(made if compiling else ()))
        return losses

    @staticmethod
    def backward(ctx, grad):
        saved = ctx.saved_tensors
        inputs, made = saved[:_INPUTS], ctx.made
        if len(saved) > _INPUTS:
            made = saved[_INPUTS:]
        ctx.made = None
        needed = ctx.needs_input_grad[:3]
        if ctx.is_early and made is not None:
            gradients = _in_backward(_ScaledGradients, grad, *inputs[:3], made)
        else:
            # In a second backward pass derivatives are made again: they went with the first one.
            kept = grad.new_empty(ctx.plan.group_floats) if made is None else made[0]
            gradients = _in_backward(
                _Gradients, grad, *inputs, ctx.ignore_index, kept, made is not None, ctx.plan,
                needed,
            )  # fmt: skip
        if ctx.workspace is not None:
            ctx.workspace.release()
        found = (g if wanted else None for g, wanted in zip(gradients, needed, strict=True))
        return *found, *[None] * 9


_INPUTS = 8  # hidden, weight, bias, labels, the teacher's three, alpha
_NO_SECOND_DERIVATIVE = (
    "soft_cross_entropy has no second derivative; for one, call soft_cross_entropy_reference, "
    "which plain autograd differentiates twice"
)


def _in_backward(function: type[Function], *arguments):
    """function.apply(*arguments), at less cost where nobody can ask for a derivative of it."""
    if torch.is_grad_enabled():
        return function.apply(*arguments)
    return function.forward(None, *arguments)


class _ScaledGradients(Function):
    """The backward pass where the forward pass has made the gradients of the losses' sum."""

    @staticmethod
    def forward(ctx, grad, hidden, weight, bias, made):
        factor = grad[0]  # as in every row
        if torch.compiler.is_compiling():
            made = [each * factor for each in made]
        else:  # nobody else has them
            for each in made:
                each.mul_(factor)
        return made[0].to(hidden.dtype), made[1].to(weight.dtype), made[2]

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(_NO_SECOND_DERIVATIVE)


class _Gradients(Function):
    """The backward pass, a function of its own so that a second derivative is refused."""

    @staticmethod
    def forward(ctx, grad, *arguments):
        *inputs, kept, is_kept, plan, needed = arguments
        return torch.ops.fastvlp.soft_cross_entropy_gradients(
            *inputs, grad, kept, is_kept, plan.group_rows, plan.chunk_rows,
            list(needed),
        )  # fmt: skip

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(_NO_SECOND_DERIVATIVE)


register_operators()
register_backends(
    "soft_cross_entropy",
    example={"hidden": (2, 8), "weight": (4, 8)},
    first=native_on_cpu,
    **CANDIDATES,
)
