"""What the commands of ``fastvlp evaluate`` share: the model, and how scores are said."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import tyro

from fastvlp.data import RgbConversion
from fastvlp.models import base
from fastvlp.models.checkpoints import LoadReport
from fastvlp.train import parallel, ranges, trained
from fastvlp.train.config import Convert, Device
from fastvlp.train.parallel import Ranks


@dataclass
class Common:
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
                *others, last = self.kinds
                wanted = f"{', '.join(others)} or {last}" if others else last
                raise ValueError(f"model: expected one of {wanted}, got one of {model.kind}")
            if report is not None and ranks.is_first:
                print(report)
            tokenizer = trained.tokenizer(self.model, model, self.tokenizer)
            scores = score(model.to(ranks.device), tokenizer, ranks)
            if ranks.is_first:
                for line in _lines(scores):
                    print(line)
                if self.output is not None:
                    whole = self._about if "sets" in self._about else self._about | scores
                    found = json.dumps(whole, indent=2)
                    self.output.write_text(f"{found}\n", encoding="utf-8")
        return scores

    def _load(self) -> tuple[base.Model, LoadReport | str | None]:
        return trained.load(self.model, self.activation, self.end_token)

    def name_data(self, ranks: Ranks, **about: Any) -> None:
        """Print, and keep for the file, which data are evaluated on."""
        self._about = about
        if ranks.is_first:
            print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)

    def conversion(self) -> RgbConversion:
        """How images become 8-bit RGB: as is asked for, else as the model's own run had it."""
        return trained.conversion(self.model, self.convert, self.background)


def _lines(scores: dict[str, float]) -> list[str]:
    """A score on each line, with its interval where it has one."""
    width = max(30, *map(len, scores))
    lines = []
    for name, value in scores.items():
        if name.endswith((" low", " high")):
            continue
        line = f"{name:{width}} {value:.4f}"
        if f"{name} low" in scores:
            line += f"  ({scores[f'{name} low']:.4f} to {scores[f'{name} high']:.4f})"
        lines.append(line)
    return lines
