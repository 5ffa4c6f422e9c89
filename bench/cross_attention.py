"""Time of the attention of text to image tokens, forward and backward, against its peers.

    python bench/cross_attention.py --queries 30,120 --dtype fp32,bf16
    python bench/cross_attention.py --layer --batch 16

Three attentions are measured: `cross`, every image with the same number of query rows;
`ragged`, captions of random lengths, which fastvlp takes packed and its peers padded; and
`self`, the self-attention of such captions. With --layer: a whole fusion layer on the pairs of
one training step, which fastvlp groups by image, against the padded layer that projects an
image's keys and values once for every pair.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from _harness import measure, report
from _harness.measure import BOUND, OURS
from _harness.run import Run
from baselines.cross_attention import attention, fusion_layer
from baselines.cross_attention import inputs as attention_inputs
from baselines.cross_attention.inputs import PARTS, Case

PACKAGES = ("transformers", "flash-attn", "xformers", "triton", "numpy")
PHASES = ("fwd", "fwd+bwd")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    flags = measure.parser(__doc__)
    flags.add_argument("--images", type=int, default=32, help="images (4 if quick)")
    flags.add_argument("--heads", type=int, default=12)
    flags.add_argument("--dim", type=int, default=64, help="width of a head")
    flags.add_argument("--keys", type=int, default=577, help="image tokens")
    flags.add_argument(
        "--queries",
        type=measure.positives,
        help="query rows per image (default 30,120; 30 if quick)",
    )
    measure.add_dtypes(flags)
    flags.add_argument(
        "--phase",
        type=measure.choices(*PHASES),
        help="fwd, fwd+bwd (default both; fwd+bwd if quick)",
    )
    flags.add_argument(
        "--part",
        type=measure.choices(*PARTS),
        default=list(PARTS),
        help=f"which attention: {', '.join(PARTS)}",
    )
    flags.add_argument("--mask", action="store_true", help="a key mask with a hole in each image")
    flags.add_argument("--dropout", type=float, default=0.0, help="of the attention weights")
    flags.add_argument("--layer", action="store_true", help="a whole fusion layer instead")
    flags.add_argument("--batch", type=int, default=16, help="images of --layer (2 if quick)")
    measure.add_omissions(flags, compiled=True)
    args = flags.parse_args(argv)
    for name in ("images", "heads", "dim", "keys", "batch"):
        if getattr(args, name) < 1:
            flags.error(f"--{name} must be positive")
    if not 0 <= args.dropout < 1:
        flags.error("--dropout must be in [0, 1)")
    if args.quick:
        args.images, args.batch = min(args.images, 4), min(args.batch, 2)
    args.queries = args.queries or ([30] if args.quick else [30, 120])
    args.phase = args.phase or (["fwd+bwd"] if args.quick else list(PHASES))
    return args


def cases(args: argparse.Namespace) -> list[Case]:
    """Every attention to be measured; the self-attention does not depend on --queries."""
    found = []
    for part, dtype in itertools.product(args.part, args.dtype):
        for queries in args.queries[:1] if part == "self" else args.queries:
            found.append(
                Case(part, args.images, args.heads, args.dim, args.keys, queries, dtype,
                     args.mask, args.dropout, args.device)
            )  # fmt: skip
    return found


def measure_case(case: Case, phase: str, run: Run) -> None:
    backward = phase == "fwd+bwd"
    implementations, absent = attention.implementations(case, backward)
    reference = functools.partial(attention_inputs.float64_reference, backward)
    run.compare(
        case.op(),
        implementations,
        functools.partial(attention_inputs.draw, case),
        functools.partial(attention_inputs.draw, case.tiny()),
        missing=absent,
        dtype=case.dtype,
        shape=case.shape(),
        phase=phase,
        # Every implementation draws its own dropout mask: there is no common result.
        reference=None if case.dropout else reference,
    )


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    axis = ("images", "images") if args.layer else ("queries", "query rows per image")
    with Run(args, PACKAGES, axis=axis, summary=summary, facts={"work": []}) as run:
        if args.layer:
            fusion_layer.measure_layers(args, run)
            return
        work = run.facts["work"]
        for case, phase in itertools.product(cases(args), args.phase):
            facts = {"op": case.op(), "dtype": case.dtype, "shape": case.shape()}
            facts |= attention_inputs.work(attention_inputs.draw(case))
            work += [facts] if facts not in work else []
            measure_case(case, phase, run)


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each of fastvlp's rows: against the best peer of any layout, the best of its own,
    and the bounds."""
    lines = [""]
    for group in report.groups(rows):
        timed = [row for row in group if row["ms"]]
        bounds = [row for row in timed if row["impl"].startswith(BOUND)]
        peers = [row for row in timed if not row["impl"].startswith((OURS, BOUND))]
        for ours in (row for row in timed if row["impl"].startswith(OURS)):
            shape = ", ".join(f"{key} {value}" for key, value in ours["shape"].items())
            parts = [f"{ours['impl']} {ours['ms']:.1f} ms"]
            own = [row for row in peers if is_heads_first(row) == is_heads_first(ours)]
            best = [min(each, key=lambda row: row["ms"]) for each in (peers, own) if each]
            for peer in {row["impl"]: row for row in best}.values():
                parts.append(f"{peer['ms'] / ours['ms']:.2f}x as fast as {peer['impl']}")
            for bound in bounds:
                share = bound["ms"] / ours["ms"]
                parts.append(f"{share:.0%} of the floor of {bound['matmuls']} matmuls")
            lines.append(
                f"{ours['op']} {ours['phase']} {ours['dtype']}, {shape}: " + ", ".join(parts) + "."
            )
    return "\n".join(lines)


def is_heads_first(row: Mapping[str, Any]) -> bool:
    return row["impl"].endswith("heads first")


if __name__ == "__main__":
    main()
