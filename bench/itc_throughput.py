"""Throughput of the symmetric image–text contrastive loss, forward and backward.

    python bench/itc_throughput.py
    python bench/itc_throughput.py --full --n 2048,8192 --dim 512 --dtype fp32,bf16

Times fastvlp.losses.ClipLoss against its peers on the features of real image–caption
pairs, and against the matmuls that no implementation can do without; measures the
extra peak memory of each and its error against float64.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from _harness import measure, memory
from _harness.measure import BOUND, OURS
from _harness.run import Run
from _harness.timing import status
from baselines.contrastive import features, softmax

OP = "contrastive"
# By size of the run: pairs of the comparisons, of fastvlp alone, and which features are taken.
N = {"quick": (1024,), "default": (1024, 4096), "full": (1024, 2048, 4096, 8192)}
MEMORY_N = {"quick": (), "default": (16384,), "full": (32768,)}
PAIRS = {"quick": "cached", "default": "some", "full": "all"}
PACKAGES = ("open_clip_torch", "inf-cl", "memeff", "triton", "numpy")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    flags = measure.parser(__doc__)
    flags.add_argument(
        "--full",
        action="store_true",
        help="larger N, more rounds, torch.compile and all pairs: about 8 minutes",
    )
    flags.add_argument(
        "--n",
        type=measure.integers(2),
        help="pairs (default 1024,4096; 1024,2048,4096,8192 if full; 1024 if quick)",
    )
    flags.add_argument("--dim", type=int, default=512, help="width of the features")
    measure.add_dtypes(flags)
    flags.add_argument("--scale", type=float, default=100.0, help="exp(logit_scale)")
    flags.add_argument(
        "--memory-n",
        type=measure.integers(2, may_be_empty=True),
        metavar="N,...",
        help="fastvlp alone at these N: time and memory (default 16384; 32768 if full; none if "
        "quick)",
    )
    flags.add_argument(
        "--error-n", type=int, default=8192, help="largest N to compare with float64"
    )
    flags.add_argument(
        "--features",
        choices=("auto", "random"),
        default="auto",
        help="auto: of real pairs where what that takes is installed",
    )
    flags.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="with torch.compile, which takes about 10 s for each of its rows (default: if full)",
    )
    measure.add_omissions(flags, compiled=False)
    args = flags.parse_args(argv)
    if args.quick and args.full:
        flags.error("--quick and --full: choose one of them")
    size = "quick" if args.quick else "full" if args.full else "default"
    args.n = args.n or list(N[size])
    if args.memory_n is None:
        args.memory_n = list(MEMORY_N[size])
    args.memory_n = [n for n in args.memory_n if n not in args.n]
    args.features = "random" if args.features == "random" else PAIRS[size]
    if args.compile is None:
        args.compile = args.full
    if args.dim < 1 or not 0 < args.scale < float("inf"):
        flags.error("--dim and --scale must be positive")
    return args


def main(
    argv: Sequence[str] | None = None,
    our_loss: Callable[[], softmax.Loss] = softmax.ours,
) -> None:
    args = parse(argv)
    with Run(
        args,
        PACKAGES,
        axis=("n", "pairs N"),
        rate=("pairs/s", "n"),
        columns=("logits", "softmax"),
        legend="logits, softmax: the precision to which logits are rounded before the softmax, and "
        "that of the softmax.",
        summary=functools.partial(summary, kinds=args.dtype, n=max(args.n)),
        facts={"scale": args.scale},
    ) as run:
        if args.device == "cpu":
            memory.preload("fastvlp.losses", "torch.distributed.nn")
        if not (args.full or args.rounds or args.quick):
            run.settings = dataclasses.replace(run.settings, min_rounds=3, budget_s=2.0)
        compare_all(args, run, our_loss)


def compare_all(args: argparse.Namespace, run: Run, our_loss: Callable[[], softmax.Loss]) -> None:
    """Every comparison, the smallest N first, and then fastvlp alone."""
    torch.manual_seed(0)
    source, run.missing = features.prepare(args.features)
    run.facts["features"] = sorted({features.describe(source, n, args.dim) for n in args.n})
    run.print("\n".join(f"Features: {note}." for note in run.facts["features"]))
    run.with_compiled = args.compile
    if not args.compile:
        run.missing.append(measure.Missing("torch.compile", "left out", "--compile or --full"))
    build = {
        dtype: functools.partial(inputs, source, args.dim, dtype, args.scale, args.device)
        for dtype in args.dtype
    }
    for n, dtype in itertools.product(args.n, args.dtype):
        implementations, absent = softmax.implementations(dtype, args.device, our_loss)
        run.compare(
            OP,
            implementations,
            functools.partial(build[dtype], n=n),
            functools.partial(build[dtype], n=64),
            missing=absent,
            dtype=dtype,
            shape={"n": n, "d": args.dim},
            reference=softmax.float64_reference if n <= args.error_n else None,
            judged=softmax.JUDGED,
        )
    for n, dtype in itertools.product(args.memory_n, args.dtype):
        ours = softmax.implementations(dtype, args.device, our_loss)[0][0]
        run.add([alone(ours, build[dtype], run.settings, dtype, n, args.dim)])


def inputs(
    source: features.Source, dim: int, dtype: str, scale: float, device: str, n: int
) -> softmax.Inputs:
    """Unit-norm features of n pairs and the scale; the same for the same arguments."""
    image, text = features.pairs(source, n, dim)
    kind = measure.DTYPES[dtype]
    return softmax.Inputs(
        image.to(device, kind), text.to(device, kind), torch.tensor(scale, device=device)
    )


def alone(
    implementation: measure.Implementation,
    build: Callable[..., softmax.Inputs],
    settings: measure.Settings,
    dtype: str,
    n: int,
    dim: int,
) -> dict[str, Any]:
    """Time and memory of fastvlp where its peers would not fit."""
    with status(f"{OP} {dtype} n={n}: {implementation.name} alone"):
        probe = memory.extra_peak(
            implementation.make,
            functools.partial(build, n=n),
            functools.partial(build, n=64),
            threads=settings.threads,
            device=settings.device,
            repeats=1,
        )
    if probe.failure:
        raise RuntimeError(f"{implementation.name} at N = {n}: {probe.failure}")
    return measure.row(
        OP, implementation, dtype, {"n": n, "d": dim}, "fwd+bwd", [probe.ms], probe.peak_mb
    )


def summary(rows: Sequence[Mapping[str, Any]], kinds: Sequence[str], n: int) -> str:
    """One paragraph: fastvlp against its best peers and the bounds at N = n."""
    sentences = []
    for dtype in kinds:
        group = [row for row in rows if row["dtype"] == dtype and row["shape"]["n"] == n]
        ours = next(row for row in group if row["impl"] == OURS)
        parts = [f"{ours['ms']:.0f} ms ({n / ours['ms'] * 1e3:,.0f} pairs/s)"]
        for what, peer in rivals(group, dtype).items():
            parts.append(f"{peer['ms'] / ours['ms']:.2f}x as fast as {peer['impl']} ({what})")
        for bound in (row for row in group if row["impl"].startswith(BOUND) and row["ms"]):
            parts.append(
                f"{bound['ms'] / ours['ms']:.0%} of the torch.mm floor of "
                f"{bound['matmuls']} matmuls"
            )
        if ours["peak_mb"] is not None:
            parts.append(f"{ours['peak_mb']:.0f} MB extra")
        sentences.append(f"{dtype}: " + ", ".join(parts) + ".")
    return f"\n{OURS} at N = {n}, forward and backward. " + " ".join(sentences)


def rivals(group: Sequence[Mapping[str, Any]], dtype: str) -> dict[str, Mapping[str, Any]]:
    """The peers worth a ratio in the summary, each with what it is the best of."""
    peers = sorted(
        (row for row in group if row["impl"] != OURS and row["ms"] and "softmax" in row),
        key=lambda row: row["ms"],
    )
    precise = [row for row in peers if row["softmax"] == "fp32"]
    low = [row for row in peers if row["softmax"] != "fp32"]
    races = {
        "best peer with fp32 softmax": precise,
        "best of those uncompiled": [row for row in precise if "compiled" not in row["impl"]],
        "best with fp32 logits too": [row for row in precise if row["logits"] == "fp32"],
        "best with lower softmax": low,
        f"all-{dtype} eager": [
            row
            for row in low
            if row["impl"].startswith(("open", "eager")) and "compiled" not in row["impl"]
        ],
    }
    found: dict[str, Mapping[str, Any]] = {}
    for what, field in races.items():
        if field and field[0] not in found.values():
            found[what] = field[0]
    return found


if __name__ == "__main__":
    main()
