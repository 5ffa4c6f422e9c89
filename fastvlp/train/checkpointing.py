"""Checkpoints of a run: written beside the training, whole or not at all, on any number of ranks.

A checkpoint is a folder `step-00000100` in the format of torch.distributed.checkpoint. It is
written as `step-00000100.part` and gets its name when everything in it is on the disk, so that what
has the name is complete, at whatever moment the run was killed. What was damaged later is told by
checksums, see `fastvlp.train.checkpoint_files`.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from fastvlp.data.shards.write import sync_folder
from fastvlp.nn.ema_model import EmaModel
from fastvlp.train import checkpoint_files, parallel
from fastvlp.train.loop import Loop, Report
from fastvlp.train.parallel import Ranks

_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class Checkpoints:
    """A hook that saves the loop every so many steps and at its end, and finds what it saved.

    Args:
        folder: of the checkpoints.
        ranks: the processes of the run, all of which call the methods together.
        ema: the moving average, or None.
        every: steps between two checkpoints.
        keep: how many of the last ones stay.
        seed: of random numbers after a resume on another number of ranks.
    """

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        *,
        ema: EmaModel | None = None,
        every: int = 100,
        keep: int = 2,
        seed: int = 0,
    ) -> None:
        self.folder, self.ranks, self.ema = folder, ranks, ema
        self.every, self.keep, self.seed = every, keep, seed
        self._writing: Future | None = None
        self._published, self._error = threading.Event(), None
        # A group of its own, because it is used while the training uses the other one.
        self._group = dist.new_group(backend="gloo") if ranks.group is not None else None
        # It says that there is one process only, which is known, and says so in the background.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")
        if ranks.is_first:
            folder.mkdir(parents=True, exist_ok=True)
            for rest in folder.glob("*.part"):
                shutil.rmtree(rest)
        ranks.barrier()

    def __call__(self, loop: Loop, report: Report) -> None:
        if loop.step % self.every == 0 or loop.step == loop.steps:
            self.save(loop)

    def latest(self) -> Path | None:
        """The newest whole checkpoint, the same on every rank.

        Damaged ones that are newer are named, and renamed, so that the run can write them again.
        Old ones that a killed run has left are removed.

        Raises:
            ValueError: all are damaged; or one is no checkpoint that may be read.
        """
        found = self._from_first(lambda: checkpoint_files.steps(self.folder)[::-1])
        damaged: dict[Path, str] = {}
        for path in found:
            fault = self._damage(path)
            if fault is None:
                self._from_first(lambda: _set_aside(damaged, path))  # noqa: B023
                self._from_first(self._remove_old)
                return path
            damaged[path] = fault
        if damaged:
            raise ValueError(
                f"folder: expected a whole checkpoint, got damaged ones only: {_listed(damaged)}; "
                f"remove {self.folder} to begin the run anew"
            )
        return None

    def save(self, loop: Loop) -> None:
        """Copies the state and writes it in the background; waits for the last one first."""
        self.wait()
        place = self.folder / f"step-{loop.step:08d}"
        if place.exists():  # a run that ended was called again
            return
        part = place.with_name(f"{place.name}.part")
        self._published.clear()
        self._writing = dcp.async_save(
            self._state(loop), checkpoint_id=str(part), process_group=self._group
        )
        # torch's future is done on the first rank when all ranks have written.
        self._writing.add_done_callback(lambda future: self._publish(future, part, place))

    def wait(self) -> None:
        """Until what is being written is in its place; raises what went wrong with it."""
        if self._writing is None:
            return
        self._writing.result()
        self._published.wait()
        self._writing = None
        if self._error is not None:
            raise self._error
        # No rank goes on to look for, or to write, what the first one is about to move.
        self.ranks.barrier()

    def close(self) -> None:
        """Waits for the last checkpoint and gives the group back."""
        self.wait()
        if self._group is not None:
            dist.destroy_process_group(self._group)

    def load(self, loop: Loop, path: Path) -> None:
        """Brings the loop, its model, optimiser and average to the state of a checkpoint."""
        state = self._state(loop)
        stored = checkpoint_files.description(path).state_dict_metadata
        mine = self._random_key()
        same_ranks = any(key.startswith(f"{mine}.") for key in stored)
        if not same_ranks:
            state.pop(mine)
        checkpoint_files.load(state, path, self._group)
        set_model_state_dict(loop.model, state["model"])
        set_optimizer_state_dict(loop.model, loop.optimizer, state["optimizer"], options=_FLAT)
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        loop.task.load_state_dict(state.get("task", {}))
        loop.load_state_dict(json.loads(state["loop"]))
        if same_ranks:
            _set_random_state(state[mine], loop.device)
        else:
            torch.manual_seed(hash((self.seed, loop.step, self.ranks.rank)) % 2**63)

    def _state(self, loop: Loop) -> dict[str, Any]:
        state: dict[str, Any] = {
            "optimizer": self._optimizer_state(loop),
            "model": get_model_state_dict(loop.model),
            "loop": json.dumps(loop.state_dict()),
            self._random_key(): _random_state(loop.device),
        }
        if self.ema is not None:
            state["ema"] = self.ema.state_dict()
        if own := loop.task.state_dict():
            state["task"] = own
        return state

    def _optimizer_state(self, loop: Loop) -> dict[str, Any]:
        # Asked for its state, an unused optimiser takes an empty step, which must not count as an
        # update of the average.
        ema, loop.optimizer.ema = loop.optimizer.ema, None
        try:
            return get_optimizer_state_dict(loop.model, loop.optimizer, options=_FLAT)
        finally:
            loop.optimizer.ema = ema

    def _random_key(self) -> str:
        return f"random-{self.ranks.rank}-of-{self.ranks.world_size}"

    def _from_first(self, function: Callable[[], Any]) -> Any:
        return parallel.from_first(function, self.ranks, self._group)

    def _damage(self, path: Path) -> str | None:
        mine = checkpoint_files.damage(path, self.ranks.rank, self.ranks.world_size)
        faults = parallel.gathered({self.ranks.rank: mine}, self.ranks).values()
        found = [fault for fault in faults if fault is not None]
        return found[0] if found else self._from_first(lambda: checkpoint_files.unreadable(path))

    def _publish(self, future: Future, part: Path, place: Path) -> None:
        try:
            if future.exception() is None and self.ranks.is_first:
                checkpoint_files.write_checksums(part)
                os.rename(part, place)
                sync_folder(self.folder)
                self._remove_old()
        except Exception as error:  # raised by `wait`, of which this thread knows nothing
            self._error = error
        finally:
            self._published.set()

    def _remove_old(self) -> None:
        for old in checkpoint_files.steps(self.folder)[: -self.keep]:
            # Its name goes first, so that no half of it is taken for a checkpoint.
            shutil.rmtree(old.rename(old.with_name(f"{old.name}.part")))


def _set_aside(damaged: dict[Path, str], used: Path) -> None:
    for path in damaged:
        place = path.with_name(f"{path.name}.damaged")
        shutil.rmtree(place, ignore_errors=True)
        path.rename(place)
    if damaged:
        print(
            f"damaged checkpoints, renamed to *.damaged: {_listed(damaged)}; going on from "
            f"{used.name}",
            flush=True,
        )


def _listed(damaged: dict[Path, str]) -> str:
    return ", ".join(f"{path.name} ({fault})" for path, fault in damaged.items())


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
