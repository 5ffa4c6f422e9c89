"""The loss of training runs by the kernels and by plain PyTorch, step by step on OpenMoji.

    python bench/train_curves.py --threads 2 --json curves.json --plot curves.png

Each system trains as `fastvlp train` does by default, for --steps steps and twice with one seed:
with the kernels, and with `reference=True`. Batches, masks, wrong images and hard negatives are
the same; what differs is rounding, which training amplifies from step to step.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _harness import measure, report
from _harness.measure import OURS
from _harness.run import Run
from _harness.table import Column, print_grid
from _harness.timing import print_line

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


def measure_curve(
    system: str, args: argparse.Namespace, settings: measure.Settings
) -> list[dict[str, Any]]:
    """Two rows: the kernels' curve and the plain one."""
    steps = 8 if args.quick else args.steps
    run = (steps, args.precision, settings.device, args.seed)
    found = {}
    for impl in (OURS, REFERENCE):
        print_line(f"{system} training, {steps} steps: {impl}")
        found[impl] = curve(system, impl == REFERENCE, *run)
    error = difference(found[OURS], found[REFERENCE])
    return [
        {
            "op": f"{system} training",
            "impl": impl,
            "dtype": args.precision,
            "shape": {"steps": steps, "seed": args.seed},
            "phase": "step",
            "loss": losses,
            "error": error if impl == OURS else None,
        }
        for impl, losses in found.items()
    ]


class Curves(Run):
    """Shows and draws losses in place of times."""

    def show(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Print the losses of one system, ours and the plain ones."""
        ours, plain = rows
        numbers = {
            "first loss": f"{ours['loss'][0]:.4f}",
            "last loss": f"{ours['loss'][-1]:.4f}",
            "last, reference": f"{plain['loss'][-1]:.4f}",
            "largest relative difference": f"{ours['error']:.1e}",
        }
        columns = [Column(heading, [number]) for heading, number in numbers.items()]
        print_grid("", Column("", [ours["op"]]), columns)

    def draw(self, path: Path) -> None:
        plot(path, self.rows)


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
    report.save_figure(path, figure, dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    flags = measure.parser(__doc__)
    flags.add_argument("--systems", type=measure.choices(*SYSTEMS), default=list(SYSTEMS))
    flags.add_argument("--steps", type=int, default=80)
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    args = flags.parse_args(argv)
    units = {"error": "largest difference of a step's loss, relative to the reference"}
    with Curves(args, axis=("steps", "step"), facts={"units": units}) as run:
        for system in args.systems:
            run.add(measure_curve(system, args, run.settings))


if __name__ == "__main__":
    main()
