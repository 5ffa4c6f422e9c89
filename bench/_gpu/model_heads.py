"""Soft cross entropy of a language-model head for gpu_model.py: ours, liger-kernel, eager forms."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from unittest import mock

import torch

from _gpu.model_case import (
    BF16,
    WORKSPACE,
    Case,
    ModelledImplementation,
    claiming_cuda,
    gradient,
    leaves,
    matmuls,
)


def our_soft_cross_entropy(width: int, vocabulary: int, teacher: bool, rows: int):
    """Both operators of `fastvlp.ops.soft_cross_entropy`, called as it does on a GPU."""
    from fastvlp.kernels.soft_cross_entropy import rows as kernels

    from fastvlp.ops.soft_cross_entropy import register as library

    head = _head(rows, width, vocabulary)
    labels, upstream = torch.arange(rows) % vocabulary, torch.full((rows,), 1 / rows)
    taught = _head(rows, width, vocabulary) if teacher else (None,) * 3
    inputs = *head, labels, *taught, torch.tensor(0.4 if teacher else 0.0)
    cpu = torch.device("cpu")
    plan = library.make_gpu_plan(rows, vocabulary, BF16, 1 + teacher, WORKSPACE, cpu)
    kept = torch.zeros(plan.group_floats)
    sizes = plan.group_rows, plan.chunk_rows

    def call():
        # Labels are not checked on a GPU; of several GPUs there is no talk.
        unchecked = mock.patch.object(library, "check_labels", lambda *_: None)
        here = mock.patch.object(kernels, "on_device", lambda tensor: nullcontext())
        with claiming_cuda(), unchecked, here:
            ops = torch.ops.fastvlp
            ops.soft_cross_entropy_losses(*inputs, -100, kept, *sizes, True, True)
            needed = [True] * 3
            ops.soft_cross_entropy_gradients(*inputs, -100, upstream, kept, True, *sizes, needed)

    return call


def _head(rows: int, width: int, vocabulary: int):
    hidden, weight = (torch.full((n, width), 0.01, dtype=BF16) for n in (rows, vocabulary))
    return hidden, weight, torch.zeros(vocabulary)


class _OnCuda(torch.Tensor):
    """A tensor that says so, and so does what is made like it."""

    device = property(lambda tensor: SimpleNamespace(type="cuda"))


def liger_cross_entropy(width: int, vocabulary: int, rows: int):
    from liger_kernel.ops import fused_linear_cross_entropy as liger

    hidden, weight, bias = leaves((rows, width), (vocabulary, width), (vocabulary,))
    weight = weight.detach().as_subclass(_OnCuda).requires_grad_()
    labels = torch.arange(rows) % vocabulary

    def call():
        # What it asks of a device decides how it adds up the gradient with respect to the weight.
        with mock.patch.object(liger, "_can_use_mm_out", lambda *_: True):
            loss = liger.LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, labels, bias)
            gradient(loss[0] if isinstance(loss, tuple) else loss, hidden, weight, bias)

    return call


def eager_soft_cross_entropy(width: int, vocabulary: int, teacher: bool, rows: int):
    import soft_cross_entropy

    given = leaves((rows, width), (vocabulary, width), (vocabulary,))
    taught = leaves((rows, width), (vocabulary, width), (vocabulary,))
    labels = torch.zeros(rows, dtype=torch.int64)

    def call():
        with torch.autocast("cpu", BF16):
            frozen = [t.detach() for t in taught] if teacher else None
            loss = soft_cross_entropy.eager()(*given, labels, frozen)
        gradient(loss, *given)

    return call


def soft_cross_entropy(rows: int, width=768, vocabulary=30522, teacher=True) -> Case:
    sizes = (width, vocabulary)
    implementations = [
        ModelledImplementation("fastvlp", partial(our_soft_cross_entropy, *sizes, teacher), (4,)),
        ModelledImplementation(
            "ALBEF's formula, autocast" if teacher else "cross_entropy, autocast",
            partial(eager_soft_cross_entropy, *sizes, teacher), eager=True,
        ),
    ]  # fmt: skip
    missing = (("peers", "no kernel library has a teacher's targets here"),)
    if not teacher:
        missing = ()
        # As many launches for 40 rows as chunks that it makes of them, of one row each.
        liger = partial(liger_cross_entropy, *sizes)
        implementations.append(
            ModelledImplementation("liger-kernel", liger, (40,), needs="liger_kernel")
        )
    count = 4 if teacher else 3
    return Case(
        "soft_cross_entropy",
        {"m": rows, "d": width, "v": vocabulary, "teacher": int(teacher)}, rows, implementations,
        matmuls(count, rows, vocabulary, width, 2 * (count - 1) * vocabulary * width),
        f"{count} matmuls, two of them of gradients, and weights and their gradient once",
        missing=missing,
    )  # fmt: skip
