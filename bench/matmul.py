"""Time of a float32 linear layer by bf16x3 GEMMs, forward and backward.

    python bench/matmul.py --rows 3152 --layers 384x1536,1536x384

Times fastvlp.nn.linear against torch.nn.functional.linear. The floor is the time of the six
bfloat16 matmuls that each float32 matmul is made of, by torch.mm. torch in bfloat16 rounds its
inputs: it is faster and less exact, see the errors.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from _harness import measure, report
from _harness.measure import BOUND, OURS, Implementation
from _harness.run import Run
from _harness.timing import Call

OP, PARTS = "matmul", 6


class Inputs(NamedTuple):
    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    upstream: torch.Tensor


def sizes(text: str) -> list[tuple[int, int]]:
    """ "384x1536,..." to pairs of widths."""
    try:
        found = [tuple(map(int, part.split("x"))) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or any(len(pair) != 2 or min(pair) < 1 for pair in found):
        raise argparse.ArgumentTypeError(f"{text!r}: expected widths as in 384x1536,1536x384")
    return found


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    flags = measure.parser(__doc__)
    flags.add_argument("--rows", type=int, help="of x (3152: 16 images; 788 if quick)")
    flags.add_argument(
        "--layers", type=sizes, default="384x1152,384x1536,1536x384,768x3072",
        help="widths before and after, each layer's",
    )  # fmt: skip
    measure.add_omissions(flags, compiled=False)
    args = flags.parse_args(argv)
    args.rows = args.rows or (788 if args.quick else 3152)
    return args


def inputs(args: argparse.Namespace, width: int, out: int, rows: int) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(args.device)

    weight = draw(out, width, scale=width**-0.5)
    return Inputs(draw(rows, width), weight, draw(out), draw(rows, out))


def layer(function: Callable[..., torch.Tensor], phase: str, given: Inputs) -> Call:
    leaves = [t.clone().requires_grad_(phase != "fwd") for t in given[:3]]

    def call() -> dict[str, torch.Tensor]:
        y = function(*leaves)
        found = {"y": y.detach()}
        if phase != "fwd":
            gradients = torch.autograd.grad(y, leaves, given.upstream.to(y.dtype))
            found |= dict(zip(("dx", "dweight", "dbias"), gradients, strict=True))
        return found

    return call


def ours(phase: str, given: Inputs) -> Call:
    from fastvlp.nn import linear

    return layer(linear, phase, given)


def plain(phase: str, given: Inputs) -> Call:
    return layer(F.linear, phase, given)


def rounded(phase: str, given: Inputs) -> Call:
    return layer(F.linear, phase, Inputs(*(t.bfloat16() for t in given)))


def floor(phase: str, given: Inputs) -> Call:
    """The bfloat16 matmuls, on operands as they lie in memory."""
    x, weight, _, upstream = (t.bfloat16() for t in given)
    matmuls = [(x, weight.T)]
    if phase != "fwd":
        matmuls += [(upstream, weight), (upstream.T, x)]

    def call() -> None:
        for a, b in matmuls:
            for _ in range(PARTS):
                torch.mm(a, b)

    return call


def implementations(phase: str) -> list[Implementation]:
    return [
        Implementation(OURS, functools.partial(ours, phase)),
        Implementation(
            f"{BOUND}, {PARTS} bf16 matmuls",
            functools.partial(floor, phase),
            bound=True,
            note=f"torch.mm in bfloat16 for the {PARTS} matmuls that each float32 one consists of",
        ),
        Implementation("torch", functools.partial(plain, phase)),
        Implementation("torch, bf16", functools.partial(rounded, phase)),
    ]


def reference(phase: str, given: Inputs) -> Mapping[str, torch.Tensor]:
    return layer(F.linear, phase, Inputs(*(t.double() for t in given)))()


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    with Run(args, axis=("out", "width after the layer"), summary=summary) as run:
        for width, out in args.layers:
            for phase in ("fwd", "fwd+bwd"):
                run.compare(
                    OP, implementations(phase),
                    functools.partial(inputs, args, width, out, args.rows),
                    functools.partial(inputs, args, 32, 32, 8), dtype="fp32",
                    shape={"rows": args.rows, "in": width, "out": out}, phase=phase,
                    reference=functools.partial(reference, phase),
                    measure_memory=phase != "fwd" and not args.quick,
                )  # fmt: skip


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line a layer and phase: rates, and ours against torch's."""
    lines = []
    for group in report.groups(rows):
        by_name = {row["impl"]: row for row in group}
        mine, peer = by_name[OURS], by_name["torch"]
        shape, matmuls = mine["shape"], 1 if mine["phase"] == "fwd" else 3
        work = 2e-6 * matmuls * shape["rows"] * shape["in"] * shape["out"]
        lines.append(
            f"{shape['in']} to {shape['out']}, {mine['phase']}: {work / mine['ms']:.0f} GFLOP/s, "
            f"torch {work / peer['ms']:.0f}: {peer['ms'] / mine['ms']:.2f}x as fast with "
            f"{mine['error'] / peer['error']:.2f} of its error."
        )
    return "\n" + "\n".join(lines)


if __name__ == "__main__":
    main()
