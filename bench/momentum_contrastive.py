"""ALBEF's contrastive step against momentum keys and a queue, forward and backward.

    python bench/momentum_contrastive.py --batch 64 --queue 65536 --dim 256 --threads 2

Times fastvlp.ops.momentum_contrastive, hard negatives included, against the formulation of the
paper (concatenated keys, queues of columns; its multinomial draw is left out), eager and compiled,
in fp32 and under bf16 autocast, against a tuned eager form, and against the matmuls alone.
"""

from __future__ import annotations

import argparse
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from _harness import measure
from _harness.measure import BOUND, OURS, Implementation
from _harness.run import Run
from torch import Tensor

OP = "momentum_contrastive"
ALPHA = 0.4
NOTES = {
    "paper": "ALBEF's formulation: batch and queue of columns concatenated, one-hot targets",
    "tuned": "plain PyTorch at its best: queues of rows, targets only as sums",
}


@dataclass(frozen=True)
class Inputs:
    """features: student image, text, teacher image, text [B, D]; queues [Q, D] and, as ALBEF keeps
    them, `columns` [D, Q], always fp32. `low` holds features and queues in the measured dtype."""

    features: tuple[Tensor, ...]
    queues: tuple[Tensor, ...]
    columns: tuple[Tensor, ...]
    low: tuple[Tensor, ...]
    temperature: Tensor


def inputs(batch: int, queue: int, dim: int, dtype: str, device: str) -> Inputs:
    """Unit vectors; the teacher's near the student's. The same for the same arguments."""
    g = torch.Generator().manual_seed(0)

    def draw(rows: int) -> Tensor:
        return F.normalize(torch.randn(rows, dim, generator=g), dim=1)

    student = draw(batch), draw(batch)
    teacher = tuple(F.normalize(t + 0.5 * draw(batch), dim=1) for t in student)
    kind = measure.DTYPES[dtype]
    # All implementations see the values that the measured dtype can hold.
    rounded = [t.to(device, kind) for t in (*student, *teacher, draw(queue), draw(queue))]
    wide = [t.float() for t in rounded]
    return Inputs(
        tuple(wide[:4]),
        tuple(wide[4:]),
        tuple(t.T.contiguous() for t in wide[4:]),
        tuple(rounded),
        torch.tensor(0.07, device=device),
    )


def paper(image, text, teacher, columns, temperature):
    """The loss as the paper's code computes it."""
    image_m, text_m = teacher
    with torch.no_grad():
        images = torch.cat([image_m.T, columns[0]], 1)
        texts = torch.cat([text_m.T, columns[1]], 1)
        taught_i = image_m @ texts / temperature
        taught_t = text_m @ images / temperature
        one_hot = torch.zeros_like(taught_i).fill_diagonal_(1)
        target_i = ALPHA * F.softmax(taught_i, 1) + (1 - ALPHA) * one_hot
        target_t = ALPHA * F.softmax(taught_t, 1) + (1 - ALPHA) * one_hot
    log_i = F.log_softmax(image @ texts / temperature, 1)
    log_t = F.log_softmax(text @ images / temperature, 1)
    return -((log_i * target_i).sum(1).mean() + (log_t * target_t).sum(1).mean()) / 2


def tuned(image, text, teacher, queues, temperature):
    """The same in the best plain PyTorch found: no concatenated keys, row-major queues, targets
    only as sums, and the one-hot part by its own logit."""
    total = 0.0
    for student, momentum, batch, queue in (
        (image, teacher[0], teacher[1], queues[1]),
        (text, teacher[1], teacher[0], queues[0]),
    ):
        logits = torch.cat([student @ batch.T, student @ queue.T], 1) / temperature
        with torch.no_grad():
            taught = torch.cat([momentum @ batch.T, momentum @ queue.T], 1).div_(temperature)
            target = F.softmax(taught.float(), 1)
        own = logits.diagonal()
        soft = torch.linalg.vecdot(target, logits.float())
        total = total + (logits.float().logsumexp(1) - ALPHA * soft - (1 - ALPHA) * own).mean()
    return total / 2


def gradients(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    leaves: Sequence[Tensor],
    backward: bool = True,
):
    """A call that computes the loss and, if asked, its gradients on fresh leaves over the same
    storage."""
    leaves = [t.detach().requires_grad_(backward) for t in leaves]
    if not backward:
        return lambda: {"loss": loss(*leaves)}

    def call() -> dict[str, Tensor]:
        value = loss(*leaves)
        d_image, d_text, d_temperature = torch.autograd.grad(value, leaves)
        return {
            "loss": value.detach(),
            "d_image": d_image,
            "d_text": d_text,
            "d_temperature": d_temperature,
        }

    return call


def ours(backward: bool, data: Inputs):
    from fastvlp.ops import momentum_contrastive

    def loss(image, text, temperature):
        return momentum_contrastive(image, text, *data.low[2:], temperature, ALPHA, seed=0).loss

    return gradients(loss, (*data.low[:2], data.temperature), backward)


def formula(name: str, autocast: bool, compiled: bool, backward: bool, data: Inputs):
    """A PyTorch formulation, in fp32 or under bf16 autocast."""
    function, queues = {"paper": (paper, data.columns), "tuned": (tuned, data.queues)}[name]
    if compiled:
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        function = torch.compile(function, dynamic=False)

    def loss(image, text, temperature):
        device = image.device.type
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            return function(image, text, data.features[2:], queues, temperature)

    return gradients(loss, (*data.features[:2], data.temperature), backward)


def matmuls(data: Inputs):
    """The matmuls that nothing can do without: student and teacher rows stacked against the
    queue, then one matmul of combined weights for the gradient; per direction."""
    batch = len(data.low[0])
    stacked = torch.cat([data.low[0], data.low[2]])
    queue = data.low[4]
    logits = torch.randn(2 * batch, len(queue), device=queue.device).to(queue.dtype)
    gradient = torch.empty_like(data.low[0])

    def call() -> None:
        for _ in range(2):
            torch.mm(stacked, queue.T, out=logits)
            torch.mm(logits[:batch], queue, out=gradient)

    return call


def float64(data: Inputs) -> Mapping[str, Tensor]:
    def loss(image, text, temperature):
        teacher, queues = (tuple(t.double() for t in side)
                           for side in (data.features[2:], data.columns))  # fmt: skip
        return paper(image, text, teacher, queues, temperature)

    leaves = [t.double() for t in (*data.features[:2], data.temperature)]
    return gradients(loss, leaves)()


def implementations(dtype: str, compiled: bool, backward: bool = True) -> list[Implementation]:
    """Ours, with a backward pass the bound, and the peers, compiled as well if asked."""
    found = [Implementation(OURS, functools.partial(ours, backward))]
    if backward:
        note = "torch.mm for the logits against both queues and for the gradients alone"
        found.append(Implementation(BOUND, matmuls, bound=True, note=note))
    for name in ("paper", "tuned"):
        for autocast in (False, True) if dtype != "fp32" else (False,):
            label = f"{name} {'autocast' if autocast else 'fp32'}"
            make = functools.partial(formula, name, autocast, False, backward)
            found.append(Implementation(label, make, note=NOTES[name]))
            if compiled:
                make = functools.partial(formula, name, autocast, True, backward)
                found.append(Implementation(f"{label} compiled", make, compiled=True))
    return found


def summary(rows: Sequence[Mapping]) -> str:
    """Ratios of every implementation to fastvlp, by dtype."""
    lines = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        group = {row["impl"]: row for row in rows if row["dtype"] == dtype}
        own = group[OURS]
        parts = [f"{own['ms']:.1f} ms, {own['peak_mb'] or 0:.1f} MB extra"]
        for name, row in group.items():
            if name == OURS or not row["ms"]:
                continue
            memory = f", {row['peak_mb']:.0f} MB" if row["peak_mb"] else ""
            parts.append(f"{row['ms'] / own['ms']:.2f}x as fast as {name}{memory}")
        lines.append(f"{OURS} {dtype}: " + "; ".join(parts) + ".")
    return "\n" + "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    flags = measure.parser(__doc__)
    flags.add_argument("--batch", type=int, default=64)
    flags.add_argument("--queue", type=int, default=0, help="default 65536; 8192 if quick")
    flags.add_argument("--dim", type=int, default=256)
    flags.add_argument("--dtype", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    measure.add_omissions(flags, compiled=True)
    args = flags.parse_args(argv)
    args.queue = args.queue or (8192 if args.quick else 65536)
    if min(args.batch, args.dim, args.queue) < 1:
        flags.error("--batch, --queue and --dim must be positive")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    axis = ("q", "queue rows Q")
    with Run(args, ("triton", "numpy"), axis=axis, summary=summary) as run:
        for dtype in args.dtype:
            build = functools.partial(
                inputs, queue=args.queue, dim=args.dim, dtype=dtype, device=args.device
            )
            run.compare(
                OP,
                implementations(dtype, run.with_compiled),
                functools.partial(build, batch=args.batch),
                functools.partial(build, batch=4, queue=64),
                dtype=dtype,
                shape={"b": args.batch, "q": args.queue, "d": args.dim},
                reference=float64,
            )


if __name__ == "__main__":
    main()
