"""Where the numbers of a run go beside its log: TensorBoard always, Weights & Biases when asked."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from fastvlp.data.optional import require

Kind = Literal["tensorboard", "wandb"]
_PROJECT, _ID = "fastvlp", "wandb_id"


class TensorBoard:
    """Event files in the folder `tensorboard` of a run; those of later steps count no more."""

    def __init__(self, folder: Path, step: int) -> None:
        library = require("torch.utils.tensorboard")
        self._writer = library.SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run of Weights & Biases, the same one when the training goes on; its id lies in the folder.

    Account, project and mode are those of wandb's own variables, such as WANDB_PROJECT and
    WANDB_MODE=offline.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        library = library_of_wandb()
        file = folder / _ID
        if not file.is_file():
            file.write_text(uuid.uuid4().hex[:12])
        self._run = library.init(
            **({} if "WANDB_PROJECT" in os.environ else {"project": _PROJECT}),
            name=folder.name,
            id=file.read_text().strip(),
            resume="allow",
            dir=str(folder),
            config=dict(settings),
        )

    def write(self, step: int, row: Mapping[str, float]) -> None:
        self._run.log(dict(row), step=step)

    def close(self) -> None:
        self._run.finish()


def library_of_wandb():
    """The package wandb.

    Raises:
        ImportError: it is not installed; the message says what to do.
    """
    try:
        import wandb
    except ImportError as error:
        raise ImportError(
            f"log: wandb cannot be imported ({error}); install it with: pip install wandb, or "
            "leave --log out, TensorBoard needs nothing"
        ) from error
    return wandb


def boards(
    kind: Kind, folder: Path, step: int, settings: Mapping[str, Any]
) -> list[TensorBoard | Wandb]:
    """What a run that stands at `step` writes its numbers to."""
    made: list[TensorBoard | Wandb] = [TensorBoard(folder, step)]
    if kind == "wandb":
        made.append(Wandb(folder, settings))
    return made
