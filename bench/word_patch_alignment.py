"""Time of ViLT's word-patch alignment, forward and backward, and its share of a training step.

    python bench/word_patch_alignment.py --pairs 64 --words 40 --patches 200 --dim 768

Times fastvlp.ops.word_patch_alignment against the batched PyTorch loop as ViLT writes it, eager and
compiled, and against the three matmuls nothing can do without. The training step is estimated:
one layer of a transformer of this width on words and patches together, times --layers.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from _harness import measure, report
from _harness.measure import OURS, Implementation
from _harness.run import Run
from _harness.timing import alternate, status
from baselines.word_patch_alignment import peers

OP = "word_patch_alignment"
LAYERS = "step"  # the phase of the row of a whole transformer without the op
HEAD_WIDTH = 64
JUDGED = {"fwd": ("distance",), "fwd+bwd": ("distance", "d_text", "d_image")}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    flags = measure.parser(__doc__)
    flags.add_argument("--pairs", type=int, help="B (default 64; 16 if quick)")
    flags.add_argument("--words", type=int, default=40, help="Lx")
    flags.add_argument("--patches", type=int, default=200, help="Ly")
    flags.add_argument("--dim", type=int, default=768, help="width of the features")
    flags.add_argument("--dtype", choices=tuple(measure.DTYPES), nargs="+", default=["fp32"])
    flags.add_argument(
        "--text", choices=("full", "captions"), nargs="+", default=["full", "captions"],
        help="every word valid, or 6 to 20 tokens as captions have",
    )  # fmt: skip
    flags.add_argument("--layers", type=int, default=12, help="of the transformer; 0: no estimate")
    measure.add_omissions(flags, compiled=True)
    args = flags.parse_args(argv)
    args.pairs = args.pairs or (16 if args.quick else 64)
    if min(args.pairs, args.words, args.patches, args.dim) < 1 or args.layers < 0:
        flags.error("--pairs, --words, --patches and --dim must be positive")
    if args.layers and args.dim % HEAD_WIDTH:
        flags.error(f"--dim must be a multiple of {HEAD_WIDTH} for the transformer, or --layers 0")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    show = functools.partial(summary, layers=args.layers)
    with Run(args, axis=("pairs", "pairs B"), summary=show, facts={"layers": args.layers}) as run:
        for dtype, text, phase in itertools.product(args.dtype, args.text, JUDGED):
            build = functools.partial(inputs, args, dtype, text)
            run.compare(
                OP, peers.implementations(phase), build, functools.partial(build, pairs=1),
                dtype=dtype, shape=shape(args, text), phase=phase,
                reference=functools.partial(reference, JUDGED[phase]),
                measure_memory=phase != "fwd",
            )  # fmt: skip
        if args.layers:
            run.add([transformer_row(args, run.settings)])


def shape(args: argparse.Namespace, text: str) -> dict[str, int]:
    longest = args.words if text == "full" else min(args.words, 20)
    return {
        "pairs": args.pairs, "words": args.words, "patches": args.patches, "d": args.dim,
        "longest": longest,
    }  # fmt: skip


def inputs(
    args: argparse.Namespace, dtype: str, text: str, pairs: int | None = None
) -> peers.Inputs:
    """Features with a common part, as a transformer's have; the same for the same arguments."""
    from fastvlp.ops import alignment_padding

    generator = torch.Generator().manual_seed(0)
    pairs = pairs or args.pairs
    common = torch.randn(pairs, 1, args.dim, generator=generator)
    words = torch.randn(pairs, args.words, args.dim, generator=generator) + common
    patches = torch.randn(pairs, args.patches, args.dim, generator=generator) + common
    padding = [torch.zeros(pairs, n, dtype=torch.bool) for n in (args.words, args.patches)]
    if text == "captions":
        longest = shape(args, text)["longest"]
        tokens = torch.randint(min(6, longest), longest + 1, (pairs,), generator=generator)
        images = torch.full((pairs,), args.patches)
        padding = alignment_padding(tokens, images, args.words, args.patches)
    upstream = torch.where(torch.arange(pairs) % 2 == 0, 0.1, -0.1) / pairs
    kind = measure.DTYPES[dtype]
    return peers.Inputs(
        words.to(args.device, kind), patches.to(args.device, kind),
        *(each.to(args.device) for each in padding), upstream.to(args.device),
    )  # fmt: skip


def reference(names: Sequence[str], given: peers.Inputs) -> Mapping[str, torch.Tensor]:
    found = peers.float64_reference(given)
    return {name: found[name] for name in names}


def transformer_row(args: argparse.Namespace, settings: measure.Settings) -> dict[str, Any]:
    """One pre-norm layer, forward and backward, times the number of layers; fp32."""
    layer = torch.nn.TransformerEncoderLayer(
        args.dim, args.dim // HEAD_WIDTH, 4 * args.dim, dropout=0.0, activation="gelu",
        batch_first=True, norm_first=True, device=args.device,
    )  # fmt: skip
    tokens = torch.randn(args.pairs, args.words + args.patches, args.dim, device=args.device)
    tokens.requires_grad_()

    def call() -> None:
        layer(tokens).sum().backward()

    with status("one transformer layer"):
        call()
        times = alternate(
            {"layer": call}, device=settings.device, min_rounds=2, max_rounds=3, budget_s=10.0
        )["layer"]
    return measure.row(
        OP, Implementation(f"transformer of {args.layers} layers", peers.matmuls), "fp32",
        {"rows": args.pairs * (args.words + args.patches), "d": args.dim}, LAYERS,
        [args.layers * each for each in times], None,
    )  # fmt: skip


def summary(rows: Sequence[Mapping[str, Any]], layers: int) -> str:
    """One paragraph: fastvlp against its peers, and what it costs a training step."""
    sentences = []
    layer = next((row for row in rows if row["phase"] == LAYERS), None)
    for group in report.groups([row for row in rows if row["phase"] == "fwd+bwd"]):
        ours = next(row for row in group if row["impl"] == OURS)
        parts = [f"{ours['ms']:.1f} ms"]
        parts += [
            f"{row['ms'] / ours['ms']:.1f}x as fast as {row['impl']}"
            for row in group
            if row is not ours and row["ms"] and not row["impl"].startswith(measure.BOUND)
        ]
        if layer:
            step = layer["ms"]
            shares = [f"{row['impl']} {row['ms'] / (step + row['ms']):.2%}" for row in group
                      if not row["impl"].startswith(measure.BOUND)]  # fmt: skip
            parts.append(
                f"share of a step with one fp32 pass through {layers} layers ({step:.0f} ms): "
                + ", ".join(shares)
            )
        longest = ours["shape"]["longest"]
        sentences.append(f"{ours['dtype']}, texts to {longest} tokens: " + ", ".join(parts) + ".")
    return f"\n{OURS}, forward and backward. " + " ".join(sentences)


if __name__ == "__main__":
    main()
