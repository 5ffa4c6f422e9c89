"""``fastvlp evaluate``: retrieval, matching and classification by a trained model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import tyro

from fastvlp.commands.evaluate_classes import LinearProbe, ZeroShot
from fastvlp.commands.evaluation_options import Common
from fastvlp.train import trained
from fastvlp.train.config import Verify
from fastvlp.train.parallel import Ranks
from fastvlp.train.tasks import albef_retrieval, clip, data, vilt
from fastvlp.train.trained import BUILT_IN


@dataclass
class _OfPairs(Common):
    data: tuple[str, ...] = ()
    """"openmoji", or shards; captions of equal id are captions of one image. Several sets one after
    another, each as SHARDS or NAME=SHARDS. By default the data that the model's own run evaluates
    on. Images are normalised as in the model's training."""

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

    def sets(self) -> dict[str, str]:
        """The data to evaluate on, by name."""
        chosen = self.data or trained.own_data(self.model)
        if not chosen:
            raise ValueError(
                f"data: expected --data SHARDS, or --data {BUILT_IN} for the built-in images; "
                f"{self.model} is of no run with evaluation data"
            )
        return data.named_sets(chosen, "data")

    def run_sets(self, score) -> dict[str, float]:
        """`run_all` for one set after another; of several the names stand before the scores."""

        def score_sets(model, tokenizer, ranks) -> dict[str, float]:
            sets, scores = self.sets(), {}
            whole: dict[str, Any] = {}
            for name, chosen in sets.items():
                found = score(model, tokenizer, self.loader(chosen, model, tokenizer, ranks), ranks)
                self.count_left_out(ranks)
                whole[name] = self._about | found
                before = f"{name} " if len(sets) > 1 else ""
                scores |= {f"{before}{key}": value for key, value in found.items()}
            if len(sets) > 1:
                self._about = {"sets": whole}
            return scores

        return self.run_all(score_sets)

    def loader(self, chosen: str, model, tokenizer, ranks):
        """The pairs of a set, not shuffled."""
        self._loader = None
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
        own = {} if self.data else trained.settings(self.model)
        broken = own.get("max_broken", 0.1) if self.max_broken is None else self.max_broken
        verify = self.verify or own.get("verify", "quick")
        return {"verify": verify, "max_broken": broken, "convert": self.conversion()}

    def count_left_out(self, ranks: Ranks) -> None:
        """Once the data have been read: says what of them was not evaluated."""
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

    confidence: float = 0.95
    """Of the intervals in brackets, by bootstrap over the queries."""

    seed: int = 0
    """Of the bootstrap."""

    kinds: ClassVar[tuple[str, ...]] = ("clip", "albef", "albef-retrieval")

    def execute(self) -> dict[str, float]:
        return self.run_sets(self._score)

    def _score(self, model, tokenizer, loader, ranks) -> dict[str, float]:
        from fastvlp.evaluate.retrieval import retrieval

        sure = {"confidence": self.confidence, "seed": self.seed}
        if model.system == "albef":
            found = albef_retrieval.retrieval_scores(
                model, tokenizer, loader, self.candidates, ranks, **sure
            )
            return {name.replace("/", " "): value for name, value in found.items()}
        found = clip.features(model, loader, ranks)
        images, of_text = found.unique_images()
        directions = retrieval(images, found.texts, of_text, group=ranks.group, **sure)
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
        return self.run_sets(self._score)

    def _score(self, model, tokenizer, loader, ranks) -> dict[str, float]:
        return vilt.matching_accuracy(model, tokenizer, loader, ranks)


Options = (
    Annotated[Retrieval, tyro.conf.subcommand("retrieval")]
    | Annotated[Matching, tyro.conf.subcommand("matching")]
    | Annotated[ZeroShot, tyro.conf.subcommand("zero-shot")]
    | Annotated[LinearProbe, tyro.conf.subcommand("linear-probe")]
)


@dataclass
class Evaluate:
    """A parsed command."""

    options: Retrieval | Matching | ZeroShot | LinearProbe

    def run(self) -> dict[str, float]:
        """Evaluate and print the scores."""
        return self.options.execute()


def parse(options: Sequence[str], prog: str = "fastvlp evaluate") -> Evaluate:
    """The command that ``options`` spell: what to evaluate, and its options."""
    return Evaluate(tyro.cli(Options, args=list(options), prog=prog))


if __name__ == "__main__":
    parse(sys.argv[1:], "python -m fastvlp.commands.evaluate").run()
