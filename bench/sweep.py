"""Every op against its best peer, from one row to full sizes, under each CPU instruction set.

    python bench/sweep.py --plot sweep.png --json sweep.json
    python bench/sweep.py --op self_attention --isa avx2
    python bench/sweep.py --overhead

Each cell is a comparison of the op's own benchmark for one shape, dtype and phase: our time against
that of the fastest peer. Left out are peers that are compiled, that round logits before a softmax,
or whose error is over four times ours. Every instruction set has a process of its own, in which it
is the largest for fastvlp, PyTorch, oneDNN and MKL alike, as on a CPU that has no larger one. The
largest shapes are measured under the first set alone. With --overhead only a table is printed, of
the microseconds that one call takes at shapes whose arithmetic takes next to none.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from _harness import measure, report
from _harness.measure import BOUND, OURS, Missing
from _harness.run import Run
from _harness.timing import status
from _sweep import heat_map, overhead
from _sweep.cells import Cell, cells

# How ATen, oneDNN and MKL are kept to an instruction set.
_VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
LIMITS = {
    "amx": {},
    "avx512_bf16": dict(zip(_VARIABLES, ("avx512", "AVX512_CORE_BF16", "AVX512_E2"), strict=True)),
    "avx512": dict(zip(_VARIABLES, ("avx512", "AVX512_CORE_VNNI", "AVX512"), strict=True)),
    "avx2": dict(zip(_VARIABLES, ("avx2", "AVX2", "AVX2"), strict=True)),
}
NOISE = 0.95  # a ratio that is equality within what repeated runs differ by
ACCURACY = 4  # of a peer with so many times our error nothing is expected


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    known = list(dict.fromkeys(cell.op for cell in cells(quick=False)))
    flags = measure.parser(__doc__)
    flags.add_argument("--op", type=measure.choices(*known), help="default: every op")
    flags.add_argument("--isa", type=lambda text: text.split(","), help="default: all this CPU has")
    flags.add_argument(
        "--overhead", action="store_true", help="print microseconds per call, and nothing else"
    )
    flags.set_defaults(seconds=0.5)
    args = flags.parse_args(argv)
    if args.device != "cpu":
        flags.error("--device: the instruction sets are those of a CPU; expected cpu")
    usable = instruction_sets()
    args.isa = args.isa or (usable[:1] if args.quick else usable)
    if wrong := set(args.isa) - set(usable):
        flags.error(f"--isa: expected some of {','.join(usable)}, got {','.join(sorted(wrong))}")
    args.op = args.op or known
    return args


def instruction_sets() -> list[str]:
    """Those of this CPU, the fastest first, but for the portable code."""
    from fastvlp.ops import compiled

    if reasons := compiled.load():
        raise SystemExit("; ".join(reasons))
    return [name for name in compiled.instruction_sets() if name != "portable"]


class Sweep(Run):
    """A run that prints a line for each cell, and at its end draws all of them as a heat map."""

    draws_as_it_goes = False

    def show(self, rows: Sequence[Mapping[str, Any]]) -> None:
        for group in groups(rows):
            self.print(line(group))

    def draw(self, path: Path) -> None:
        found = [cell for group in groups(self.rows) if (cell := summarised(group))]
        facts = self.meta
        where = f"{facts['cpu']}, {facts['threads']} threads, torch {facts['versions']['torch']}"
        heat_map.draw(path, found, where)


def groups(rows: Sequence[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    """The rows of each cell."""
    for isa in dict.fromkeys(row["isa"] for row in rows):
        yield from report.groups([row for row in rows if row["isa"] == isa])


def summarised(group: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Our milliseconds, those of the best peer, and their ratio; None without a peer."""
    ours = next(row for row in group if row["impl"] == OURS)
    peers = [
        row
        for row in group
        if row["ms"] and not row["impl"].startswith((OURS, BOUND))
        if row.get("softmax", "fp32") == "fp32" and not is_less_accurate(row, ours)
    ]
    if not peers:
        return None
    best = min(peers, key=lambda row: row["ms"])
    kept = ("op", "dtype", "shape", "phase", "isa", "ms")
    found = {key: ours[key] for key in kept}
    return found | {"peer": best["impl"], "peer_ms": best["ms"], "ratio": best["ms"] / ours["ms"]}


def is_less_accurate(row: Mapping[str, Any], ours: Mapping[str, Any]) -> bool:
    return bool(row["error"] and ours["error"] and row["error"] > ACCURACY * ours["error"])


def line(group: Sequence[Mapping[str, Any]]) -> str:
    cell = summarised(group)
    row = group[0]
    shape = " ".join(f"{key}={value}" for key, value in row["shape"].items())
    start = f"{row['isa']:<12} {row['op']} {row['dtype']} {row['phase']} {shape}: "
    if cell is None:
        return start + "no peer"
    mark = "  <-- a peer is faster" if cell["ratio"] < NOISE else ""
    return (
        f"{start}{cell['ms']:.3g} ms, {cell['ratio']:.2f}x as fast as {cell['peer']} "
        f"({cell['peer_ms']:.3g} ms){mark}"
    )


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    found = [cell for group in groups(rows) if (cell := summarised(group))]
    lost = [cell for cell in found if cell["ratio"] < NOISE]
    lines = [f"\n{len(found)} cells, {len(lost)} below {NOISE}x of the best peer."]
    for isa in dict.fromkeys(cell["isa"] for cell in found):
        ratios = sorted(cell["ratio"] for cell in found if cell["isa"] == isa)
        lines.append(
            f"{isa}: {ratios[0]:.2f}x at least, {ratios[len(ratios) // 2]:.2f}x in the median."
        )
    return "\n".join(lines)


def sweep(run: Run, isa: str, chosen: Sequence[Cell], args: argparse.Namespace) -> None:
    """Measure the cells under one instruction set, in a process of its own."""
    flags = ["--threads", str(run.settings.threads), "--seconds", str(args.seconds)]
    process = subprocess.Popen(
        [sys.executable, "-m", "_sweep.child", *flags],
        cwd=Path(__file__).parent, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=os.environ | {"FASTVLP_CPU_ISA": isa} | LIMITS[isa],
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        stack.callback(process.wait)
        stack.callback(process.kill)
        process.stdin.write(json.dumps([dataclasses.asdict(cell) for cell in chosen]))
        process.stdin.close()
        for cell in chosen:
            with status(f"{isa} {cell.op} {' '.join(cell.flags)}"):
                answer = process.stdout.readline()
            if not answer:
                run.add([], [Missing(f"{isa} from {cell.op} on", "its process ended")])
                return
            found = json.loads(answer)
            absent = [Missing(f"{isa} {cell.op}", found["error"])] if "error" in found else []
            run.add([row | {"isa": isa} for row in found.get("rows", [])], absent)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.overhead:
        found = [row for row in overhead.measured() if row["op"] in args.op]
        cpu = report.meta(measure.settings_from(args), ())["cpu"]
        print(f"CPU time of a call on one thread of {cpu}:\n")
        print(overhead.table(found))
        return
    chosen = [cell for cell in cells(args.quick) if cell.op in args.op]
    if args.rounds:
        chosen = [dataclasses.replace(cell, rounds=args.rounds) for cell in chosen]
    facts = {"instruction_sets": args.isa, "limits": LIMITS, "noise": NOISE}
    with Sweep(args, ("numpy",), axis=("isa", ""), summary=summary, facts=facts) as run:
        for isa in args.isa:
            sweep(run, isa, [cell for cell in chosen if isa == args.isa[0] or not cell.once], args)


if __name__ == "__main__":
    main()
