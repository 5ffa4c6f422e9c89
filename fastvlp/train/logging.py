"""What is seen of a run: a progress bar, JSON lines, boards, and an image of the curve.

Where the output is no terminal, a file or a batch system's log, lines take the bar's place.

log.jsonl      one object for each logged step or evaluation
tensorboard/   the same numbers; see fastvlp.train.boards for Weights & Biases
curve.png      the loss over the steps, and the scores of evaluations
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fastvlp.data.optional import require
from fastvlp.data.shards.write import atomic_file
from fastvlp.train import screen
from fastvlp.train.boards import Kind, TensorBoard, Wandb, boards
from fastvlp.train.loop import Loop, Report
from fastvlp.train.parallel import Ranks

_LOG = "log.jsonl"
_EVALUATION = "eval/"


class Log:
    """A hook that records every `every`-th step, with the means of losses and speed since the last.

    Losses are averaged over the ranks; only the first rank writes. Use it as a context.
    """

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        *,
        every: int = 10,
        progress: bool = True,
        boards: Kind = "tensorboard",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder, self.ranks, self.every, self.progress = folder, ranks, every, progress
        self.kind, self.settings = boards, settings or {}
        self._sums: dict[str, torch.Tensor] = {}
        self._steps = self._pairs = self._skipped = 0
        self._bar = self._file = None
        self._boards: list[TensorBoard | Wandb] = []

    def start(self, loop: Loop, changes: Sequence[str] = ()) -> Log:
        """Opens the files for a loop that goes on from where it is; drops lines of later steps.

        `changes` are texts about settings that the run did not begin with.
        """
        self._total, self._first = loop.steps, loop.step
        self._since = self._begun = time.perf_counter()
        if not self.ranks.is_first:
            return self
        self.folder.mkdir(parents=True, exist_ok=True)
        _keep_until(self.folder / _LOG, loop.step)
        progress = require("rich.progress")
        self._boards = boards(self.kind, self.folder, loop.step, self.settings)
        self._bar = progress.Progress(
            progress.TextColumn("step {task.completed}/{task.total}"),
            progress.BarColumn(20),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[numbers]}"),
        )
        # Without a terminal lines are printed at once in its place.
        self._bar.disable = not (self.progress and self._bar.console.is_terminal)
        # Last: what is open is closed at the end with all of the above.
        self._file = open(self.folder / _LOG, "a", encoding="utf-8")
        for line in (*_standing(loop, self.folder), *changes):
            self.say(line)
        self._bar.start()
        self._task = self._bar.add_task("", total=loop.steps, completed=loop.step, numbers="")
        return self

    def __call__(self, loop: Loop, report: Report) -> None:
        for name, value in report.losses.items():
            # A step that was skipped may have any loss.
            if report.taken:
                self._sums[name] = self._sums.get(name, 0) + value
        self._steps += report.taken
        self._pairs += report.pairs
        if self._bar is not None:
            self._bar.update(self._task, completed=loop.step)
        if loop.step % self.every == 0 or loop.step == loop.steps:
            self._record(loop, report)

    def evaluation(self, step: int, scores: dict[str, float]) -> None:
        """Records the scores of an evaluation."""
        self._write({"step": step, **{_of_evaluation(k): v for k, v in scores.items()}})
        if step == self._total and self._bar is not None:
            self._bar.stop()  # what comes now stands below it
        shown = screen.score_lines(step, self._total, scores)
        for line in shown if step < self._total else screen.table(scores):
            self.say(line)
        self._since, self._pairs = time.perf_counter(), 0

    def _record(self, loop: Loop, report: Report) -> None:
        seconds = max(time.perf_counter() - self._since, 1e-9)
        row: dict[str, Any] = {"step": loop.step, **self._means()}
        row |= loop.task.metrics()
        row |= {"lr": report.lr, "gradient_norm": report.norm, "skipped": loop.skipped}
        if loop.scale.enabled:
            row["loss_scale"] = loop.scale.value
        if loop.empty:
            row["steps_without_pairs"] = loop.empty
        row["pairs_per_second"] = self._pairs / seconds
        self._write(row)
        if self._bar is not None:
            self._show(row)
        self._sums, self._steps, self._pairs = {}, 0, 0
        self._since = time.perf_counter()

    def _show(self, row: dict[str, Any]) -> None:
        if self._bar.disable:
            self.say(screen.step_line(row, self._total))
        else:
            self._bar.update(self._task, numbers=screen.bar_text(row))

    def finish(self, lines: Sequence[str]) -> None:
        """Says how long it took, and these lines, below the bar."""
        if self._bar is not None:
            self._bar.stop()
        seconds, taken = time.perf_counter() - self._begun, self._total - self._first
        took = f"{taken} {'step' if taken == 1 else 'steps'} and evaluation in "
        for line in (*screen.labelled("time", took + screen.duration(seconds)), *lines):
            self.say(line)

    def _means(self) -> dict[str, float]:
        if not self._steps:
            return {}
        means = torch.stack([value.double() for value in self._sums.values()]) / self._steps
        if self.ranks.group is not None:
            dist.all_reduce(means, group=self.ranks.group)
            means /= self.ranks.world_size
        return dict(zip(self._sums, means.tolist(), strict=True))

    def _write(self, row: dict[str, Any]) -> None:
        if self._file is None:
            return
        self._file.write(json.dumps(_finite(row)) + "\n")
        self._file.flush()
        numbers = {name: value for name, value in row.items() if name != "step"}
        for board in self._boards:
            board.write(row["step"], numbers)

    def say(self, line: str) -> None:
        """Prints a line, above the bar where there is one, on the first rank."""
        if self._bar is None:
            return
        if self._bar.disable:
            print(line, flush=True)
        else:
            self._bar.console.print(line, highlight=False, markup=False)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *error) -> None:
        if self._file is not None:
            self._bar.stop()
            self._file.close()
            for board in self._boards:
                board.close()
            draw_curve(self.folder)


def _standing(loop: Loop, folder: Path) -> list[str]:
    if loop.step == loop.steps:
        return [f"{folder} is finished: all {loop.steps} steps are taken; evaluating it again"]
    return [f"resuming at step {loop.step} of {loop.steps}"] if loop.step else []


def _of_evaluation(name: str) -> str:
    """A score's name in the log: under "eval/", which held-out data may be called themselves."""
    return name if name.startswith(_EVALUATION) else f"{_EVALUATION}{name}"


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's log, without a last line that was cut off."""
    rows = []
    path = folder / _LOG
    if not path.exists():
        return rows
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def draw_curve(folder: Path) -> None:
    """Writes `curve.png` from the log."""
    rows = read_log(folder)
    figure = require("matplotlib.figure").Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for name in sorted(
        {key for row in rows for key in row if "loss" in key and "scale" not in key}
    ):
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        axes.plot(*zip(*points, strict=True), label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    scores = sorted(
        {key for row in rows for key in row if key.startswith(_EVALUATION) and "@" in key}
    )
    if scores:
        right = axes.twinx()
        right.set_ylim(0, 1)
        for name in scores:
            points = [(row["step"], row[name]) for row in rows if name in row]
            right.plot(*zip(*points, strict=True), ".--", label=name.removeprefix(_EVALUATION))
        right.legend(loc="center right", fontsize=6)
    if axes.lines:  # a run may be stopped before it has logged a step
        axes.legend(loc="upper right")
    with atomic_file(folder / "curve.png") as file:
        figure.savefig(file, format="png", dpi=120)


def _keep_until(path: Path, step: int) -> None:
    """Drops what a run wrote after the checkpoint from which it goes on."""
    kept = [row for row in read_log(path.parent) if row["step"] <= step]
    part = path.with_name(f"{path.name}.part")
    part.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    os.replace(part, path)


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    # JSON has no NaN.
    return {k: v if v == v and abs(v) != float("inf") else None for k, v in row.items()}
