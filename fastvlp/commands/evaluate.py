"""``fastvlp evaluate``: retrieval and zero-shot classification of a trained model."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from fastvlp.data.text import CaptionTokenizer
from fastvlp.models import base
from fastvlp.train import parallel
from fastvlp.train.tasks import clip, clip_setup


@dataclass
class _Common:
    run: tyro.conf.Positional[Path]
    """Folder of a trained model, as `fastvlp train` leaves it."""

    batch_size: int = 128
    """Pictures and captions that are encoded at a time, on each rank."""

    device: str = "auto"
    """auto, cpu or cuda."""

    output: Path | None = None
    """JSON file for the scores."""

    def run_all(self, score) -> dict[str, float]:
        """Print, and write, the scores that `score` gives; under torchrun over all ranks."""
        with parallel.ranks(self.device) as ranks, torch.inference_mode():
            model = base.load(self.run / "model").to(ranks.device)
            tokenizer = CaptionTokenizer.load(self.run / "tokenizer.json")
            scores = score(model, tokenizer, ranks)
            if ranks.is_first:
                for name, value in scores.items():
                    print(f"{name:30} {value:.4f}")
                if self.output is not None:
                    self.output.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
        return scores


@dataclass
class Retrieval(_Common):
    """Recall of captions by picture and of pictures by caption.

    A picture with several captions is as good as the best-ranked of them.
    """

    data: str = "openmoji"
    """"openmoji", or shards; captions of equal id are captions of one picture."""

    split: str = "composition"
    """Of OpenMoji: train, composition or concept."""

    def execute(self) -> dict[str, float]:
        return self.run_all(self._score)

    def _score(self, model, tokenizer, ranks) -> dict[str, float]:
        from fastvlp.evaluate.retrieval import retrieval

        size = model.config.image_size
        if self.data == "openmoji":
            loader = clip_setup.openmoji_loader(
                size, self.split, self.batch_size, tokenizer, ranks, training=False
            )
        else:
            loader = clip_setup.shard_loader(
                self.data, "clip_eval", size, self.batch_size, tokenizer, ranks
            )
        found = clip.features(model, loader, ranks)
        pictures, of_text = found.pictures()
        ways = retrieval(pictures, found.texts, of_text, group=ranks.group)
        return {f"{way} {k}": v for way, result in ways.items() for k, v in result.items()}


@dataclass
class ZeroShot(_Common):
    """Accuracy of giving pictures the class whose prompts are nearest."""

    images: Path | None = None
    """Folder with one folder of pictures for each class. By default the OpenMoji pictures of the
    composition split, by base emoji."""

    classes: Path | None = None
    """Text file of class names, one a line, in the sorted order of the folders. By default the
    folders' names."""

    templates: Path | None = None
    """Text file of prompts, one a line, with {} for the name. By default a short ensemble."""

    def execute(self) -> dict[str, float]:
        return self.run_all(self._score)

    def _score(self, model, tokenizer, ranks) -> dict[str, float]:
        if self.images is None:
            return clip_setup.zero_shot_openmoji(model, tokenizer, ranks, self.batch_size)
        from fastvlp.evaluate import picture_folders, zero_shot

        folders = picture_folders.find(self.images)
        names = list(folders)
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
        pictures = picture_folders.share(folders, ranks.rank, ranks.world_size)
        features, labels = picture_folders.encode(
            pictures, model.encode_image, model.config.image_size, self.batch_size, ranks.device
        )
        return zero_shot.accuracy(features, weights, labels, group=ranks.group)


Options = (
    Annotated[Retrieval, tyro.conf.subcommand("retrieval")]
    | Annotated[ZeroShot, tyro.conf.subcommand("zero-shot")]
)


@dataclass
class Evaluate:
    """A parsed command."""

    options: Retrieval | ZeroShot

    def run(self) -> dict[str, float]:
        """Evaluate and print the scores."""
        return self.options.execute()


def parse(options: Sequence[str], prog: str = "fastvlp evaluate") -> Evaluate:
    """The command that ``options`` spell: retrieval or zero-shot, and its options."""
    return Evaluate(tyro.cli(Options, args=list(options), prog=prog))


if __name__ == "__main__":
    parse(sys.argv[1:], "python -m fastvlp.commands.evaluate").run()
