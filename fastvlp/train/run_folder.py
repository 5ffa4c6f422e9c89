"""The folder of a run: one process at a time, the settings it was begun with, and its model.

config.yaml    the settings
run.json       kind and sizes of the model, and the step of the saved one
checkpoints/   see `fastvlp.train.checkpointing`
.lock          held by the process that works in the folder
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastvlp.data.optional import require
from fastvlp.data.shards.write import atomic_file
from fastvlp.models import base
from fastvlp.train import checkpoint_files, parallel
from fastvlp.train.config import TrainConfig, from_mapping, read_yaml, to_yaml
from fastvlp.train.parallel import Ranks

_SETTINGS, _RUN = "config.yaml", "run.json"
# What may change when a run goes on: how it is computed, watched and kept.
_FREE = {
    "folder", "device", "progress", "log_every", "evaluate_every", "eval_data", "candidates",
    "save_every", "keep", "resume", "max_skipped", "max_broken", "parallel", "recompute", "compile",
    "log",
}  # fmt: skip
# What may change with a word about it.
_LENGTH = "the learning rate follows the schedule of the new length"
_NOTED = {
    "steps": _LENGTH,
    "epochs": _LENGTH,
    "precision": "results differ by rounding",
    "reference": "results differ by rounding",
    "chunk_size": "results differ by rounding",
}
_PATHS = {"data", "tokenizer", "vision_weights", "text_weights", "init", "model_config"}


@contextlib.contextmanager
def alone(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Makes the folder, and keeps other runs out of it until the end, which a kill is too.

    The thread that is inside may enter again.

    Raises:
        BlockingIOError: another run works in the folder.
        ValueError: it is a file.
    """
    with contextlib.ExitStack() as held:

        def enter() -> None:
            held.enter_context(_locked(folder))

        parallel.from_first(enter, ranks)
        yield


def _locked(folder: Path) -> contextlib.AbstractContextManager:
    filelock = require("filelock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"folder: expected a folder, got {folder}, which is a file") from None
    try:
        return filelock.FileLock(folder / ".lock", timeout=0, is_singleton=True).acquire()
    except filelock.Timeout:
        raise BlockingIOError(
            f"folder: another process is training in {folder}; wait for its end, stop it, or "
            f"choose another --folder"
        ) from None


def compare(config: TrainConfig, ranks: Ranks) -> list[str]:
    """What is to be said of settings that differ from those of the run in the folder.

    A folder without checkpoints may be begun with any settings.

    Raises:
        ValueError: one differs that changes what is learned; all of them are named.
    """
    return parallel.from_first(lambda: _compare(config), ranks)


def _compare(config: TrainConfig) -> list[str]:
    folder, file = config.folder, config.folder / _SETTINGS
    if not checkpoints(folder) or not file.is_file():
        return []
    system = (_described(folder) or {"kind": config.system})["kind"]
    if system != config.system:
        raise ValueError(
            f"folder: {folder} holds a run of {system}, not of {config.system}; choose another "
            f"--folder"
        )
    stored = from_mapping(type(config), read_yaml(file), str(file))
    changes = {}
    for field in dataclasses.fields(config):
        then, now = getattr(stored, field.name), getattr(config, field.name)
        if then != now and field.name not in _FREE:
            changes[field.name] = f"{field.name} was {then}, is {now}"
    noted = {name: why for name, why in _NOTED.items() if name not in config.learns_by}
    refused = [text for name, text in changes.items() if name not in noted]
    if refused:
        moved = "; where only a path has moved, change it there" if _PATHS & changes.keys() else ""
        raise ValueError(
            f"folder: {folder} holds a run with other settings: {', '.join(refused)}. To go on "
            f"with that run give its own, --config {file}{moved}. For others choose another "
            f"--folder"
        )
    return [f"{text}: {noted[name]}" for name, text in changes.items()]


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, the newest last."""
    kept = folder / "checkpoints"
    return checkpoint_files.steps(kept) if kept.is_dir() else []


def begin(config: TrainConfig, model: base.Model, resumed: bool) -> None:
    """Writes the settings, and what the run's checkpoints are of."""
    with atomic_file(config.folder / _SETTINGS) as file:
        file.write(to_yaml(config).encode())
    _write(config.folder, model, _saved_step(config.folder) if resumed else None)


def saved(folder: Path, model: base.Model, step: int) -> None:
    """Notes the step of the model that was saved in the folder."""
    _write(folder, model, step)


def unsaved(folder: Path) -> tuple[base.Model, str] | None:
    """The model in the newest whole checkpoint of a run that did not end, and a text about it.

    None where the folder's saved model is as new, or where it is no folder of a run.
    """
    described = _described(folder)
    if described is None:
        return None
    faults = []
    for path in checkpoints(folder)[::-1]:
        if checkpoint_files.step_of(path) <= (_saved_step(folder) or 0):
            return None
        fault = checkpoint_files.damage(path) or checkpoint_files.unreadable(path)
        if fault is None:
            model = base.from_description(described)
            model.load_state_dict(checkpoint_files.read_weights(path))
            said = f"{folder}: its run did not end; taking the checkpoint {path.name}"
            return model.eval(), "; ".join([*faults, said])
        faults.append(f"the checkpoint {path.name} is damaged ({fault})")
    if faults:
        raise ValueError(f"model: expected a whole checkpoint in {folder}: {'; '.join(faults)}")
    return None


def _described(folder: Path) -> dict[str, Any] | None:
    return _read(folder).get("model")


def _saved_step(folder: Path) -> int | None:
    return _read(folder).get("saved_step")


def _read(folder: Path) -> dict[str, Any]:
    """Of run.json; nothing of a folder that an older version wrote."""
    file = folder / _RUN
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{file}: expected what `fastvlp train` writes, got {error}; where the run has ended, "
            f"remove that file"
        ) from error


def _write(folder: Path, model: base.Model, saved_step: int | None) -> None:
    about = {"model": base.description(model), "saved_step": saved_step}
    with atomic_file(folder / _RUN) as file:
        file.write(json.dumps(about, indent=2).encode() + b"\n")
