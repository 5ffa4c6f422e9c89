"""Evaluations within a run and at its end, and the best model of them.

best/    the model of the evaluation with the lowest loss on the held-out data, or where there is no
         such loss the highest R@1, with best.json, which says of which step; a path for every
         command that takes a model
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fastvlp.data.shards.write import atomic_file
from fastvlp.models.files import read_json
from fastvlp.train import parallel
from fastvlp.train.checkpointing import Checkpoints
from fastvlp.train.logging import Log
from fastvlp.train.loop import Loop, Report
from fastvlp.train.parallel import Ranks
from fastvlp.train.trained import IMAGE_VALUES

BEST, _FILE = "best", "best.json"


@dataclass(frozen=True)
class Judged:
    """By which evaluations are compared: a number, less is better, and what it is."""

    step: int
    by: str
    value: float


def judge(step: int, scores: dict[str, float]) -> Judged | None:
    """The mean loss over all held-out data; else 1 less the mean R@1; else nothing."""
    losses = [value for name, value in scores.items() if name.endswith("/loss")]
    if losses:
        return Judged(step, "held-out loss", sum(losses) / len(losses))
    recalls = [value for name, value in scores.items() if name.endswith("/R@1")]
    if recalls:
        return Judged(step, "1 - R@1", 1 - sum(recalls) / len(recalls))
    return None


class Best:
    """The best model of a run so far, in a folder of its own.

    Args:
        folder: of the run.
        save: writes the present model into a folder; called on all ranks.
        ranks: the processes of the run.
        begun: whether the run goes on, so that what is there is its own.
    """

    def __init__(
        self, folder: Path, save: Callable[[Path], None], ranks: Ranks, begun: bool
    ) -> None:
        self.folder, self._save, self.ranks = folder / BEST, save, ranks
        self.found: Judged | None = parallel.from_first(lambda: self._read(begun), ranks)

    def offer(self, judged: Judged | None) -> bool:
        """Keeps the present model if it is better than those before; whether it is.

        The first rank decides: saving takes all of them together, and their losses may differ in
        the last bit.
        """
        better = parallel.from_first(lambda: self._is_better(judged), self.ranks)
        if better is None:
            return False
        self.found = better
        self._save(self.folder)
        parallel.from_first(self._write, self.ranks)
        return True

    def _is_better(self, judged: Judged | None) -> Judged | None:
        """What is judged, if it is a number and less than the least so far."""
        least = float("inf") if self.found is None else self.found.value
        return judged if judged is not None and judged.value < least else None

    def _read(self, begun: bool) -> Judged | None:
        file = self.folder / _FILE
        if not begun:
            shutil.rmtree(self.folder, ignore_errors=True)
        return Judged(**read_json(file)) if file.is_file() else None

    def _write(self) -> None:
        for name in ("config.yaml", IMAGE_VALUES):
            if (file := self.folder.parent / name).is_file():
                shutil.copyfile(file, self.folder / name)
        with atomic_file(self.folder / _FILE) as file:
            file.write(json.dumps(asdict(self.found), indent=2).encode() + b"\n")


class Evaluation:
    """A hook that evaluates every so many steps, once the last checkpoint is written.

    Args:
        model: what is evaluated: the model, or the moving average of its weights.
        every: steps between evaluations, or None for none but the last.
        best: where the best model is kept, where there are several evaluations.
    """

    def __init__(
        self,
        model: nn.Module,
        every: int | None,
        log: Log,
        checkpoints: Checkpoints,
        best: Best | None = None,
    ) -> None:
        self.model, self.every, self.log, self.checkpoints = model, every, log, checkpoints
        self.best = best

    def __call__(self, loop: Loop, report: Report) -> None:
        if self.every and loop.step % self.every == 0 and loop.step < loop.steps:
            self.checkpoints.wait()
            self.scores(loop)

    def scores(self, loop: Loop) -> dict[str, float]:
        """Evaluates and records; the model is as it was afterwards."""
        training = self.model.training
        self.model.eval()
        with loop.autocast():
            scores = loop.task.evaluate(self.model)
        self.model.train(training)
        if scores:
            self.log.evaluation(loop.step, scores)
            if self.best is not None:
                self.best.offer(judge(loop.step, scores))
        return scores


def interval(config: Any, steps: int) -> int | None:
    """Steps between evaluations: as is set, else ten evaluations of a CLIP on one's own data."""
    if config.evaluate_every is not None:
        return config.evaluate_every
    own = config.has_open_settings and config.eval_data and config.data != "openmoji"
    return max(1, steps // 10) if own else None
