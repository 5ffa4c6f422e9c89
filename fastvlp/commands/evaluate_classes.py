"""``fastvlp evaluate zero-shot`` and ``linear-probe``: classification of images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tyro import MISSING

from fastvlp.commands.evaluation_options import Common
from fastvlp.data import class_folders
from fastvlp.train import parallel, trained
from fastvlp.train.parallel import Ranks
from fastvlp.train.tasks import clip_setup
from fastvlp.train.trained import BUILT_IN


def encode_labelled(
    command: Common, model: Any, labelled: list[tuple[Path, int]], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Features and labels of labelled images, prepared as the command's model wants them."""
    return class_folders.encode(
        labelled,
        model.encode_image,
        model.config.image_size,
        command.batch_size,
        device,
        *trained.image_values(command.model),
        command.conversion(),
    )


@dataclass
class ZeroShot(Common):
    """Accuracy of giving images the class whose prompts are nearest."""

    images: Path | None = None
    """Folder with one folder of images for each class, or "openmoji" for the built-in images
    of the composition split, by base emoji; the default for a model that was trained on those."""

    classes: Path | None = None
    """Text file of class names, one a line, in the sorted order of the folders. By default the
    folders' names."""

    templates: Path | None = None
    """Text file of prompts, one a line, with {} for the name. By default a short ensemble."""

    def execute(self) -> dict[str, float]:
        return self.run_all(self._score)

    def _score(self, model, tokenizer, ranks) -> dict[str, float]:
        own = trained.own_data(self.model) == (BUILT_IN,)
        if str(self.images) == BUILT_IN or (self.images is None and own):
            scores, pairs = clip_setup.zero_shot_openmoji(model, tokenizer, ranks, self.batch_size)
            self.name_data(ranks, data=BUILT_IN, split="composition", pairs=pairs)
            return scores
        if self.images is None:
            raise ValueError(
                f"images: expected --images FOLDER, with a folder of images for each class, or "
                f"--images {BUILT_IN} for the built-in ones; {self.model} was not trained on those"
            )
        from fastvlp.evaluate import zero_shot

        folders = class_folders.find(self.images)
        names = list(folders)
        count = sum(map(len, folders.values()))
        self.name_data(ranks, data=str(self.images), classes=len(names), images=count)
        if self.classes is not None:
            names = [line for line in self.classes.read_text("utf-8").splitlines() if line]
        if len(names) != len(folders):
            raise ValueError(
                f"classes: expected {len(folders)} names, one for each folder, got {len(names)}"
            )
        templates = zero_shot.TEMPLATES
        if self.templates is not None:
            templates = zero_shot.read_templates(self.templates)
        weights = zero_shot.classifier(
            zero_shot.prompts(names, templates),
            tokenizer,
            lambda tokens: model.encode_text(tokens.to(ranks.device)),
            batch_size=self.batch_size,
        )
        labelled = class_folders.share(folders, ranks.rank, ranks.world_size)
        features, labels = encode_labelled(self, model, labelled, ranks.device)
        encoded = sum(parallel.sizes(len(labels), ranks.group))
        self._about |= {"images": encoded, "left_out": count - encoded}
        return zero_shot.accuracy(features, weights, labels, group=ranks.group)


@dataclass
class LinearProbe(Common):
    """Accuracy of a linear classifier that is trained on the frozen features of images, by CLIP."""

    train: Path = MISSING
    """Folder to train on, with one folder of images for each class."""

    test: Path = MISSING
    """Folder to test on, with folders of the same names."""

    penalty: float | None = None
    """Weight of the L2 penalty. By default chosen on a fifth of the training images."""

    seed: int = 0
    """Of the choice of that fifth."""

    def execute(self) -> dict[str, float]:
        return self.run_all(self._score)

    def _score(self, model, tokenizer, ranks) -> dict[str, float]:
        from fastvlp.evaluate.linear_probe import PENALTIES, linear_probe

        if ranks.group is not None:
            raise ValueError("linear-probe: expected one process, got several; leave out torchrun")
        parts = {"train": class_folders.find(self.train), "test": class_folders.find(self.test)}
        names = {name: row for row, name in enumerate(parts["train"])}
        if unknown := sorted(set(parts["test"]) - set(names)):
            raise ValueError(
                f"test: expected folders of the classes in {self.train}, got {unknown[0]!r}"
            )
        found = {
            part: self._features(model, folders, names, ranks) for part, folders in parts.items()
        }
        self.name_data(
            ranks, train=str(self.train), test=str(self.test), classes=len(names),
            train_images=len(found["train"][1]), test_images=len(found["test"][1]),
        )  # fmt: skip
        penalties = PENALTIES if self.penalty is None else (self.penalty,)
        return linear_probe(*found["train"], *found["test"], penalties=penalties, seed=self.seed)

    def _features(self, model, folders, names: dict[str, int], ranks: Ranks):
        labelled = [(path, names[name]) for name, paths in folders.items() for path in paths]
        return encode_labelled(self, model, labelled, ranks.device)
