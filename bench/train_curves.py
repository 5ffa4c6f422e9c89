"""The loss of training runs by the kernels and by plain PyTorch, step by step on OpenMoji.

    python bench/train_curves.py --threads 2 --json curves.json --plot curves.png

Each system trains as `fastvlp train` does by default, for --steps steps and twice with one seed:
with the kernels, and with `reference=True`. Batches, masks, wrong pictures and hard negatives are
the same; what differs is rounding, which training amplifies from step to step.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
import report
from harness import OURS
from rich.console import Console
from rich.table import Table

from fastvlp.commands.train import SYSTEMS
from fastvlp.train.logging import read_log
from fastvlp.train.run import train

REFERENCE = "reference"


def curve(
    system: str, reference: bool, steps: int, precision: str, device: str, seed: int
) -> list[float]:
    """The loss at each step of a run from scratch."""
    with tempfile.TemporaryDirectory() as folder:
        config = SYSTEMS[system](
            folder=Path(folder),
            steps=steps,
            reference=reference,
            precision=precision,
            device=device,
            seed=seed,
            save_every=steps,
            log_every=1,
        )
        train(config)
        return [row["loss"] for row in read_log(config.folder) if "loss" in row]


def difference(ours: Sequence[float], plain: Sequence[float]) -> float:
    """The largest difference of two curves, relative to the plain one."""
    return max(abs(a - b) / abs(b) for a, b in zip(ours, plain, strict=True))


def measure(args: argparse.Namespace, settings: harness.Settings) -> list[dict[str, Any]]:
    rows = []
    steps = 8 if args.quick else args.steps
    for system in args.systems:
        run = (steps, args.precision, settings.device, args.seed)
        found = {impl: curve(system, impl == REFERENCE, *run) for impl in (OURS, REFERENCE)}
        error = difference(found[OURS], found[REFERENCE])
        for impl, losses in found.items():
            rows.append(
                {
                    "op": f"{system} training",
                    "impl": impl,
                    "dtype": args.precision,
                    "shape": {"steps": steps, "seed": args.seed},
                    "phase": "step",
                    "loss": losses,
                    "error": error if impl == OURS else None,
                }
            )
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    found = Table()
    columns = ("", "first loss", "last loss", "last, reference", "largest relative difference")
    for name in columns:
        found.add_column(name, justify="left" if not name else "right")
    for ours, plain in zip(rows[::2], rows[1::2], strict=True):
        numbers = ours["loss"][0], ours["loss"][-1], plain["loss"][-1]
        found.add_row(ours["op"], *(f"{n:.4f}" for n in numbers), f"{ours['error']:.1e}")
    return found


def plot(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One panel for each system; the kernels' wide line below the plain one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(rows) // 2 + 1, 3.6), layout="constrained")
    panels = figure.subplots(1, len(rows) // 2, squeeze=False)[0]
    styles = {
        OURS: {"color": "#D55E00", "linewidth": 4, "alpha": 0.6},
        REFERENCE: {"color": "#000000", "linewidth": 1},
    }
    for i, row in enumerate(rows):
        panel = panels[i // 2]
        panel.plot(
            range(1, len(row["loss"]) + 1), row["loss"], label=row["impl"], **styles[row["impl"]]
        )
        panel.set_title(f"{row['op']}, {row['dtype']}, seed {row['shape']['seed']}", fontsize=10)
        panel.set_xlabel("step")
        panel.grid(True, alpha=0.3)
    panels[0].set_ylabel("loss")
    panels[0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    flags = harness.parser(__doc__.splitlines()[0])
    flags.add_argument("--systems", type=harness.choices(*SYSTEMS), default=list(SYSTEMS))
    flags.add_argument("--steps", type=int, default=80)
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    args = flags.parse_args(argv)
    report.require_plotting(args.plot)
    settings = harness.settings_from(args)
    rows = measure(args, settings)
    Console().print(table(rows))
    if args.json:
        units = {"error": "largest difference of a step's loss, relative to the reference"}
        facts = report.meta(settings, (), [], units=units)
        report.write_json(args.json, facts, rows)
    if args.plot:
        plot(args.plot, rows)


if __name__ == "__main__":
    main()
