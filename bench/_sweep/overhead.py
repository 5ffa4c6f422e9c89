"""Microseconds that a call takes at shapes whose arithmetic takes next to none.

They are the CPU time of one thread, so that other processes count for little: the least of several
batches, between which an op and plain PyTorch alternate.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvlp import ops

BATCHES, CALLS = 15, 100


@dataclass(frozen=True)
class Case:
    """`torch_call`: of PyTorch's own functions, without a check of any argument."""

    op: str
    shape: str
    phase: str
    call: Callable[[], Any]
    torch_call: Callable[[], Any]


def cases() -> Iterator[Case]:
    yield from _contrastive()
    yield from _momentum()
    yield from _soft_cross_entropy()
    yield from _word_patch()
    yield from _attention()
    yield from _ema()
    yield from _matmul()


def measured(calls: int = CALLS, batches: int = BATCHES) -> list[dict[str, Any]]:
    """A row for each case, on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [_row(case, calls, batches) for case in cases()]
    finally:
        torch.set_num_threads(before)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| op | shape | phase | fastvlp, µs | PyTorch, µs |",
        "| --- | --- | --- | ---: | ---: |",
    ]
    for row in rows:
        found = f"{row['us']:.0f} | {row['torch_us']:.0f}"
        lines.append(f"| `{row['op']}` | {row['shape']} | {row['phase']} | {found} |")
    return "\n".join(lines)


def _row(case: Case, calls: int, batches: int) -> dict[str, Any]:
    both = case.call, case.torch_call
    least = [float("inf")] * 2
    for call in both:
        call()
    for _ in range(batches):
        for i, call in enumerate(both):
            start = time.thread_time_ns()
            for _ in range(calls):
                call()
            least[i] = min(least[i], (time.thread_time_ns() - start) / calls / 1e3)
    kept = {"op": case.op, "shape": case.shape, "phase": case.phase}
    return kept | {"us": least[0], "torch_us": least[1]}


def _phases(op: str, shape: str, call: Callable, torch_call: Callable) -> Iterator[Case]:
    """Forward without gradients, and forward and backward of a loss."""

    def forward(loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.no_grad():
                return loss()

        return run

    yield Case(op, shape, "fwd", forward(call), forward(torch_call))
    yield Case(op, shape, "fwd+bwd", lambda: call().backward(), lambda: torch_call().backward())


def _leaf(*shape: int) -> Tensor:
    return F.normalize(torch.randn(shape), dim=-1).requires_grad_()


def _contrastive() -> Iterator[Case]:
    images, texts = _leaf(8, 64), _leaf(8, 64)
    scale, labels = torch.tensor(14.3, requires_grad=True), torch.arange(8)

    def plain() -> Tensor:
        logits = scale * images @ texts.T
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    yield from _phases(
        "contrastive", "8 x 64", lambda: ops.contrastive(images, texts, scale), plain
    )


def _momentum() -> Iterator[Case]:
    images, texts = _leaf(4, 16), _leaf(4, 16)
    teacher = [_leaf(4, 16).detach() for _ in range(2)]
    queues = [_leaf(16, 16).detach() for _ in range(2)]
    temperature, alpha, pairs = torch.tensor(0.07, requires_grad=True), 0.4, torch.eye(4, 20)

    def direction(student: Tensor, own: Tensor, keys: Tensor) -> Tensor:
        with torch.no_grad():
            targets = alpha * F.softmax(own @ keys.T / temperature, 1) + (1 - alpha) * pairs
        return -(F.log_softmax(student @ keys.T / temperature, 1) * targets).sum(1).mean()

    def plain() -> Tensor:
        keys = [torch.cat(both) for both in zip(teacher, queues, strict=True)]
        forth = direction(images, teacher[0], keys[1])
        return (forth + direction(texts, teacher[1], keys[0])) / 2

    def ours() -> Tensor:
        found = ops.momentum_contrastive(
            images, texts, *teacher, *queues, temperature, alpha, hard_negatives=False
        )
        return found.loss

    yield from _phases("momentum_contrastive", "4 x 16, queue of 16", ours, plain)


def _soft_cross_entropy() -> Iterator[Case]:
    hidden, weight, bias = _leaf(4, 16), _leaf(50, 16), torch.zeros(50, requires_grad=True)
    labels = torch.randint(50, (4,))
    yield from _phases(
        "soft_cross_entropy",
        "4 x 16, vocabulary of 50",
        lambda: ops.soft_cross_entropy(hidden, weight, bias, labels),
        lambda: F.cross_entropy(F.linear(hidden, weight, bias), labels),
    )


def _word_patch() -> Iterator[Case]:
    words, patches = _leaf(1, 4, 16), _leaf(1, 6, 16)
    padding = [torch.zeros(1, size, dtype=torch.bool) for size in (4, 6)]
    yield from _phases(
        "word_patch_alignment",
        "1 pair, 4 words, 6 patches",
        lambda: ops.word_patch_alignment(words, patches, *padding).sum(),
        lambda: ops.word_patch_alignment_reference(words, patches, *padding).sum(),
    )


def _attention() -> Iterator[Case]:
    packed = [_leaf(8, 2, 64) for _ in range(3)]
    padded = [
        t.detach().view(2, 4, 2, 64).transpose(1, 2).contiguous().requires_grad_() for t in packed
    ]
    starts = torch.tensor([0, 4, 8], dtype=torch.int32)
    yield from _phases(
        "cross_attention",
        "2 texts of 4, 2 heads of 64",
        lambda: ops.cross_attention(*packed, starts, starts, max_seqlen_q=4, max_seqlen_k=4).sum(),
        lambda: F.scaled_dot_product_attention(*padded).sum(),
    )


def _ema() -> Iterator[Case]:
    weights = [torch.randn(16) for _ in range(20)]
    momentum = [weight.clone() for weight in weights]
    yield Case(
        "ema",
        "20 tensors of 16",
        "step",
        lambda: ops.ema(momentum, weights, 0.995),
        lambda: torch._foreach_lerp_(momentum, weights, 0.005),
    )


def _matmul() -> Iterator[Case]:
    a, b = torch.randn(8, 32), torch.randn(32, 32)
    yield Case("matmul", "8 x 32 x 32", "fwd", lambda: ops.matmul(a, b), lambda: a @ b)
