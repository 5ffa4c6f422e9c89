"""Throughput of the masked language modelling head with cross entropy, forward and backward.

    python bench/soft_cross_entropy.py --rows 1000 --dtype fp32,bf16 --threads 2

Times fastvlp.ops.soft_cross_entropy with a teacher (ALBEF's momentum distillation) and without one
against eager PyTorch, torch.compile of it and torch's chunked F.linear_cross_entropy, on rows that
are masked ones already, and against the matmuls that no implementation can do without;
measures the extra peak memory of each and its error against float64. In half precision the hidden
states are low and the weights float32, as under autocast.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from _harness import measure, report
from _harness.measure import BOUND, DTYPES, OURS, Implementation, Missing
from _harness.run import Run
from torch import Tensor

OP = "soft_cross_entropy"
PACKAGES = ("triton", "liger-kernel", "cut-cross-entropy", "numpy")
ALPHA = 0.4
RESULTS = ("loss", "d_hidden", "d_weight", "d_bias")


@dataclass(frozen=True)
class Inputs:
    """hidden [M, D], weight [V, D], bias [V], labels [M]; the same three of the teacher."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    labels: Tensor
    teacher: tuple[Tensor, Tensor, Tensor]


# (hidden, weight, bias, labels, teacher) -> loss
Loss = Callable[..., Tensor]


def draw(rows: int, width: int, vocabulary: int, dtype: str, device: str) -> Inputs:
    """A head that gives the labels a third of the probability, and a teacher close to it."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weight, bias = normal(vocabulary, width) * (1.5 / width**0.5), normal(vocabulary) / 2
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    hidden = normal(rows, width) + 4.5 * weight[labels]
    teacher = hidden + normal(rows, width) / 4, weight + normal(vocabulary, width) / 100, bias
    low = DTYPES[dtype]
    return Inputs(
        hidden.to(device, low),
        weight.to(device),
        bias.to(device),
        labels.to(device),
        (teacher[0].to(device, low), teacher[1].to(device), teacher[2].to(device)),
    )


def forward_backward(
    make_loss: Callable[[], Loss], teacher: bool, inputs: Inputs, backward: bool = True
) -> Callable:
    """A call that computes the loss and, if asked, gradients on leaves over the same storage."""
    loss = make_loss()
    tensors = (inputs.hidden, inputs.weight, inputs.bias)
    leaves = [t.detach().requires_grad_(backward) for t in tensors]
    rest = (inputs.labels, inputs.teacher if teacher else None)

    def call() -> dict[str, Tensor]:
        value = loss(*leaves, *rest)
        gradients = torch.autograd.grad(value, leaves) if backward else ()
        return dict(zip(RESULTS, (value.detach(), *gradients), strict=False))

    return call


# Keeps the derivatives of 2,470 rows of 30,522 in float32.
LARGE_WORKSPACE = 288 << 20


def ours(**options) -> Loss:
    from fastvlp.ops import soft_cross_entropy

    def call(hidden, weight, bias, labels, teacher):
        if teacher is None:
            return soft_cross_entropy(hidden, weight, bias, labels, **options)
        return soft_cross_entropy(
            hidden,
            weight,
            bias,
            labels,
            teacher_hidden=teacher[0],
            teacher_weight=teacher[1],
            teacher_bias=teacher[2],
            alpha=ALPHA,
            **options,
        )

    return call


def eager() -> Loss:
    """ALBEF's formulation (arXiv 2107.07651, equation 7), on the masked rows only."""

    def call(hidden, weight, bias, labels, teacher):
        logits = F.linear(hidden, weight, bias)
        loss = F.cross_entropy(logits, labels)
        if teacher is None:
            return loss
        with torch.no_grad():
            targets = F.softmax(F.linear(*teacher), -1)
        soft = -(F.log_softmax(logits, -1) * targets).sum(-1).mean()
        return (1 - ALPHA) * loss + ALPHA * soft

    return call


def autocast(make_loss: Callable[[], Loss], dtype: str, device: str) -> Loss:
    loss = make_loss()

    def call(*arguments):
        with torch.autocast(device, DTYPES[dtype]):
            return loss(*arguments)

    return call


def compiled(make_loss: Callable[[], Loss]) -> Loss:
    # It looks for a GPU each time it is loaded, and warns each time that there is none.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    return torch.compile(make_loss(), dynamic=False)


def chunked(**options) -> Loss:
    """torch's chunked `F.linear_cross_entropy`."""

    def call(hidden, weight, bias, labels, teacher):
        return F.linear_cross_entropy(
            hidden,
            weight.to(hidden.dtype),
            labels,
            linear_bias=bias.to(hidden.dtype),
            options=torch.nn.LinearCrossEntropyOptions(**options),
        )

    return call


def chunked_implementations(dtype: str, quick: bool) -> list[Implementation]:
    """At the best of 256 to 1000 rows and both policies here; and, ten times slower, at its own
    choice of chunks."""
    best: dict[str, Any] = {"batch_chunk_size": 512}
    if DTYPES[dtype] != torch.float32:
        best["acc_policy"] = "compact"
    make = functools.partial(chunked, **best)
    note = f"in chunks of {best['batch_chunk_size']} rows, the fastest of 256 to 1000"
    found = [_implementation("linear_cross_entropy tuned", make, False, note=note)]
    return found if quick else [_implementation("linear_cross_entropy", chunked, False), *found]


def liger() -> Loss:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    def call(hidden, weight, bias, labels, teacher):
        result = LigerFusedLinearCrossEntropyFunction.apply(
            hidden, weight.to(hidden.dtype), labels, bias.to(hidden.dtype)
        )
        return result[0] if isinstance(result, tuple) else result

    return call


def cut() -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    def call(hidden, weight, bias, labels, teacher):
        weight, bias = weight.to(hidden.dtype), bias.to(hidden.dtype)
        return linear_cross_entropy(hidden, weight, labels, bias=bias)

    return call


def matmuls(teacher: bool, inputs: Inputs) -> Callable[[], None]:
    """The matmuls of `hidden.dtype` by torch.mm: logits, the teacher's, two gradients."""
    hidden, weight = inputs.hidden, inputs.weight.to(inputs.hidden.dtype)
    other, other_weight = inputs.teacher[0], inputs.teacher[1].to(hidden.dtype)
    logits = torch.empty(len(hidden), len(weight), dtype=hidden.dtype, device=hidden.device)
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def call() -> None:
        if teacher:
            torch.mm(other, other_weight.T, out=logits)
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=d_hidden)
        torch.mm(logits.T, hidden, out=d_weight)

    return call


def implementations(
    dtype: str, device: str, teacher: bool, compile_: bool, quick: bool = False
) -> tuple[list[Implementation], list[Missing]]:
    """Ours, the bound and every peer that can run here; and those that cannot, with reasons."""
    make_eager: Callable[[], Loss] = eager
    name = "eager"
    if DTYPES[dtype] != torch.float32:
        make_eager, name = functools.partial(autocast, eager, dtype, device), "eager autocast"
    found = [
        _implementation(OURS, ours, teacher),
        Implementation(
            BOUND,
            functools.partial(matmuls, teacher),
            bound=True,
            note="torch.mm for logits" + ", the teacher's" * teacher + " and two gradients alone",
            extra={"matmuls": 3 + teacher},
        ),
        _implementation(name, make_eager, teacher),
    ]
    missing = []
    if not quick:
        make = functools.partial(ours, workspace_bytes=LARGE_WORKSPACE)
        note = f"keeps more logits: workspace_bytes={LARGE_WORKSPACE:,}"
        found.append(_implementation(f"{OURS} large workspace", make, teacher, note=note))
    if compile_:
        make = functools.partial(compiled, make_eager)
        found.append(_implementation(f"{name} compiled", make, teacher, compiled=True))
    if teacher:
        return found, missing
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        found += chunked_implementations(dtype, quick)
    else:
        reason = f"torch {torch.__version__} has no chunked F.linear_cross_entropy"
        missing.append(Missing("linear_cross_entropy", reason, "pip install -U torch"))
    for peer, module, make in (
        ("liger-kernel", "liger_kernel", liger),
        ("cut-cross-entropy", "cut_cross_entropy", cut),
    ):
        if device != "cuda":
            missing.append(Missing(peer, "runs on a GPU only", "--device cuda"))
        elif importlib.util.find_spec(module) is None:
            missing.append(Missing(peer, "not installed", f"pip install {peer}"))
        else:
            found.append(_implementation(peer, make, teacher))
    return found, missing


def _implementation(
    name: str,
    make_loss: Callable[[], Loss],
    teacher: bool,
    compiled: bool = False,
    note: str = "",
) -> Implementation:
    make = functools.partial(forward_backward, make_loss, teacher)
    return Implementation(name, make, compiled=compiled, note=note)


def float64_reference(teacher: bool, inputs: Inputs) -> Mapping[str, Tensor]:
    """Loss and gradients in float64 from the inputs as they are."""
    wide = Inputs(
        inputs.hidden.double(),
        inputs.weight.double(),
        inputs.bias.double(),
        inputs.labels,
        tuple(t.double() for t in inputs.teacher),
    )
    return forward_backward(eager, teacher, wide)()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    flags = measure.parser(__doc__)
    flags.add_argument("--rows", type=int, help="masked rows (default 1000; 240 if quick)")
    flags.add_argument("--width", type=int, default=768)
    flags.add_argument("--vocabulary", type=int, default=30522)
    measure.add_dtypes(flags)
    measure.add_omissions(flags, compiled=True)
    args = flags.parse_args(argv)
    args.rows = args.rows or (240 if args.quick else 1000)
    if min(args.rows, args.width, args.vocabulary) < 1:
        flags.error("--rows, --width and --vocabulary must be positive")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    with Run(
        args,
        PACKAGES,
        axis=("m", "masked rows"),
        rate=("rows/s", "m"),
        summary=summary,
        facts={"alpha": ALPHA},
    ) as run:
        for dtype, teacher in itertools.product(args.dtype, (True, False)):
            found, absent = implementations(
                dtype, args.device, teacher, run.with_compiled, args.quick
            )
            build = functools.partial(draw, args.rows, args.width, args.vocabulary, dtype)
            run.compare(
                OP,
                found,
                functools.partial(build, args.device),
                functools.partial(draw, 8, args.width, 64, dtype, args.device),
                missing=absent,
                dtype=dtype,
                shape={"m": args.rows, "d": args.width, "v": args.vocabulary, "teacher": teacher},
                reference=functools.partial(float64_reference, teacher),
            )


def gradient_mb(row: Mapping[str, Any]) -> float:
    """What the three gradients take, in MB."""
    shape = row["shape"]
    low = DTYPES[row["dtype"]].itemsize
    return (low * shape["m"] * shape["d"] + 4 * shape["v"] * (shape["d"] + 1)) / 1e6


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line per comparison: fastvlp against each peer and the bound."""
    lines = [""]
    for group in report.groups(rows):
        own = next(row for row in group if row["impl"] == OURS)
        parts = []
        for row in group:
            if row is own or not row["ms"]:
                continue
            part = f"{row['ms'] / own['ms']:.2f} of {row['impl']}"
            if row["peak_mb"] and own["peak_mb"]:
                extra, least = (r["peak_mb"] - gradient_mb(r) for r in (own, row))
                part += f" (memory beyond gradients {extra:.0f} of {least:.0f} MB)"
            parts.append(part)
        kind = "with" if own["shape"]["teacher"] else "without"
        lines.append(f"{own['dtype']}, {kind} teacher: {own['ms']:.0f} ms; time of peers over ours")
        lines += [f"  {part}" for part in parts]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
