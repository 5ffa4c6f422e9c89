"""``fastvlp evaluate``: retrieval, matching and zero-shot classification of a trained model."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import tyro

from fastvlp.data import RgbConversion, class_folders
from fastvlp.models import base
from fastvlp.models.checkpoints import LoadReport
from fastvlp.train import parallel, ranges, trained
from fastvlp.train.config import Convert, Device, Verify
from fastvlp.train.parallel import Ranks
from fastvlp.train.tasks import albef_retrieval, clip, clip_setup, data, vilt
from fastvlp.train.trained import BUILT_IN


@dataclass
class _Common:
    model: tyro.conf.Positional[Path]
    """Folder of a run of `fastvlp train`, of which an unfinished one is evaluated by its newest
    checkpoint; a model saved by fastvlp.models.base.save; or a published checkpoint of CLIP, ViLT
    or ALBEF, file or folder."""

    tokenizer: Path | None = None
    """Vocabulary of the captions. By default that of the run, beside the model, or the one that the
    papers use."""

    activation: str | None = None
    """Of weights from open_clip, which do not tell it: gelu or quick_gelu."""

    end_token: Literal["largest"] | int | None = None
    """Of CLIP's weights without a configuration file, with a vocabulary of their own: where a text
    is read. largest: at its largest id, open_clip's default. A number: at the token of this id."""

    batch_size: int = 128
    """Images and captions that are encoded at a time, on each rank."""

    device: Device = "auto"
    """Where to compute."""

    convert: Convert | None = None
    """Of shards and folders: how images become 8-bit RGB. range: transparent pixels on a
    background, 16-bit and float images by their range. pillow: Pillow's convert("RGB"). By default
    as the run was trained; range for other models."""

    background: str | None = None
    """Of shards and folders: the colour under transparent pixels, by name or as #rrggbb. By default
    as the run was trained; white for other models."""

    output: Path | None = None
    """JSON file for the scores, with the data they are of."""

    kinds: ClassVar[tuple[str, ...]] = ("clip",)

    def __post_init__(self) -> None:
        ranges.check(self)
        self._about: dict[str, Any] = {}

    def run_all(self, score) -> dict[str, float]:
        """Print, and write, the scores that `score` gives; under torchrun over all ranks."""
        with parallel.ranks(self.device) as ranks, torch.inference_mode():
            model, report = self._load()
            if model.kind not in self.kinds:
                raise ValueError(
                    f"model: expected one of {' or '.join(self.kinds)}, got one of {model.kind}"
                )
            if report is not None and ranks.is_first:
                print(report)
            tokenizer = trained.tokenizer(self.model, model, self.tokenizer)
            scores = score(model.to(ranks.device), tokenizer, ranks)
            self.count_left_out(ranks)
            if ranks.is_first:
                for name, value in scores.items():
                    print(f"{name:30} {value:.4f}")
                if self.output is not None:
                    found = json.dumps(self._about | scores, indent=2)
                    self.output.write_text(f"{found}\n", encoding="utf-8")
        return scores

    def _load(self) -> tuple[base.Model, LoadReport | str | None]:
        return trained.load(self.model, self.activation, self.end_token)

    def name_data(self, ranks: Ranks, **about: Any) -> None:
        """Print, and keep for the file, which data are evaluated on."""
        self._about = about
        if ranks.is_first:
            print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)

    def count_left_out(self, ranks: Ranks) -> None:
        """Once the data have been read: says what of them was not evaluated."""

    def conversion(self) -> RgbConversion:
        """How images become 8-bit RGB: as is asked for, else as the model's own run had it."""
        return trained.conversion(self.model, self.convert, self.background)


@dataclass
class _OfPairs(_Common):
    data: str | None = None
    """"openmoji", or shards; captions of equal id are captions of one image. By default the data
    that the model's own run evaluates on. Images are normalised as in the model's training."""

    split: str = "composition"
    """Of OpenMoji: train, composition or concept."""

    verify: Verify | None = None
    """Of shards: how images are examined beforehand. decode: decode each, which takes one pass. By
    default that of the run on its own data, and quick on others."""

    max_broken: float | None = None
    """Of shards: the largest bearable share of broken samples, which are left out. By default that
    of the run on its own data, and 0.1 on others."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._loader: Any = None

    def loader(self, model, tokenizer, ranks):
        """The pairs, not shuffled."""
        chosen = self.data or trained.own_data(self.model)
        if chosen is None:
            raise ValueError(
                f"data: expected --data SHARDS, or --data {BUILT_IN} for the built-in images; "
                f"{self.model} is of no run with evaluation data"
            )
        # ViLT and ALBEF want a mask besides, CLIP finds the end of a text by itself.
        tokenize = tokenizer if model.kind == "clip" else tokenizer.padded
        if chosen == BUILT_IN:
            images = data.openmoji_data(model.config.image_size, ranks)
            loader = data.openmoji_loader(
                images, self.split, self.batch_size, tokenize, ranks, training=False
            )
            self.name_data(ranks, data=chosen, split=self.split, pairs=loader.samples)
            return loader
        loader = data.shard_loader(
            chosen,
            trained.recipe(self.model, model),
            {},
            self.batch_size,
            tokenize,
            ranks,
            **self.image_options(),
        )
        self.name_data(ranks, data=chosen, pairs=loader.samples)
        self._loader, self._known = loader, len(data.left_out(loader, ranks))
        return loader

    def image_options(self) -> dict[str, Any]:
        own = trained.settings(self.model) if self.data is None else {}
        broken = own.get("max_broken", 0.1) if self.max_broken is None else self.max_broken
        verify = self.verify or own.get("verify", "quick")
        return {"verify": verify, "max_broken": broken, "convert": self.conversion()}

    def count_left_out(self, ranks: Ranks) -> None:
        if self._loader is None:
            return
        faults = data.left_out(self._loader, ranks)
        # The pairs that were named before are without what the index tells to be broken.
        self._about["pairs"] -= len(faults) - self._known
        self._about["left_out"] = len(faults)
        if faults and ranks.is_first:
            print(f"{data.about_left_out(faults, 'data')}; {self._about['pairs']} pairs evaluated")


@dataclass
class Retrieval(_OfPairs):
    """Recall of captions by image and of images by caption, by CLIP or ALBEF.

    An image with several captions is as good as the best-ranked of them. ALBEF's contrastive
    features choose candidates, which its matching head then ranks again.
    """

    candidates: int = 32
    """Of re-ranking, for each caption and each image. ALBEF's paper takes 128 and 256."""

    kinds: ClassVar[tuple[str, ...]] = ("clip", "albef")

    def execute(self) -> dict[str, float]:
        return self.run_all(self._score)

    def _score(self, model, tokenizer, ranks) -> dict[str, float]:
        from fastvlp.evaluate.retrieval import retrieval

        loader = self.loader(model, tokenizer, ranks)
        if model.kind == "albef":
            found = albef_retrieval.retrieval_scores(
                model, tokenizer, loader, self.candidates, ranks
            )
            return {name.replace("/", " "): value for name, value in found.items()}
        found = clip.features(model, loader, ranks)
        images, of_text = found.unique_images()
        directions = retrieval(images, found.texts, of_text, group=ranks.group)
        return {
            f"{direction} {k}": v
            for direction, result in directions.items()
            for k, v in result.items()
        }


@dataclass
class Matching(_OfPairs):
    """Accuracy of ViLT's matching head: each image with its caption and with a wrong one."""

    kinds: ClassVar[tuple[str, ...]] = ("vilt",)

    def execute(self) -> dict[str, float]:
        return self.run_all(self._score)

    def _score(self, model, tokenizer, ranks) -> dict[str, float]:
        loader = self.loader(model, tokenizer, ranks)
        return vilt.matching_accuracy(model, tokenizer, loader, ranks)


@dataclass
class ZeroShot(_Common):
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
        chosen = self.images or trained.own_data(self.model)
        if str(chosen) == BUILT_IN:
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
        features, labels = class_folders.encode(
            labelled,
            model.encode_image,
            model.config.image_size,
            self.batch_size,
            ranks.device,
            *trained.image_values(self.model),
            self.conversion(),
        )
        encoded = sum(parallel.sizes(len(labels), ranks.group))
        self._about |= {"images": encoded, "left_out": count - encoded}
        return zero_shot.accuracy(features, weights, labels, group=ranks.group)


Options = (
    Annotated[Retrieval, tyro.conf.subcommand("retrieval")]
    | Annotated[Matching, tyro.conf.subcommand("matching")]
    | Annotated[ZeroShot, tyro.conf.subcommand("zero-shot")]
)


@dataclass
class Evaluate:
    """A parsed command."""

    options: Retrieval | Matching | ZeroShot

    def run(self) -> dict[str, float]:
        """Evaluate and print the scores."""
        return self.options.execute()


def parse(options: Sequence[str], prog: str = "fastvlp evaluate") -> Evaluate:
    """The command that ``options`` spell: retrieval, matching or zero-shot, and its options."""
    return Evaluate(tyro.cli(Options, args=list(options), prog=prog))


if __name__ == "__main__":
    parse(sys.argv[1:], "python -m fastvlp.commands.evaluate").run()
