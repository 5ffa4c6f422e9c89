"""``fastvlp embed``: features of images and texts, as a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import tyro

from fastvlp.commands.progress import progress
from fastvlp.commands.search import clip_of, encode_showing_progress
from fastvlp.data.image_folder import find_images
from fastvlp.data.optional import require
from fastvlp.data.shards.write import atomic_file
from fastvlp.factory import Created
from fastvlp.train import parallel, ranges
from fastvlp.train.config import Device

# Unreadable images that are named.
_NAMED = 5


@dataclass(frozen=True)
class Embedded:
    """Names and features [n, dim] of the images, and of the texts."""

    image_names: list[str]
    images: np.ndarray
    texts: list[str]
    text_features: np.ndarray


@dataclass
class Embed:
    """Write a CLIP's features of the images of a folder, of the lines of a text file, or of both.

    Features are float32 of norm 1, so that their dot products are cosine similarities.
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Folder of a run of `fastvlp train clip`, or a published checkpoint of CLIP, file or
    folder."""

    output: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUTPUT")]
    """File to write. .npz: the arrays images [n, dim], image_names, text_features [m, dim] and
    texts. .parquet: a row for each with the columns kind (image or text), name and features."""

    images: Path | None = None
    """Folder of images, at any depth."""

    texts: Path | None = None
    """Text file, a text in each line; empty lines are left out."""

    batch_size: int = 64
    """Images or texts that are encoded at a time."""

    tokenizer: Path | None = None
    """Vocabulary of the texts. By default that of the run, beside the model, or CLIP's own."""

    activation: str | None = None
    """Of weights from open_clip, which do not tell it: gelu or quick_gelu."""

    device: Device = "auto"
    """Where to compute."""

    progress: bool = True
    """Show how far it is."""

    def __post_init__(self) -> None:
        ranges.check(self)

    def run(self) -> Embedded:
        """Encode, write, and give what was written."""
        if self.output.suffix not in (".npz", ".parquet"):
            raise ValueError(f"output: expected a name in .npz or .parquet, got {self.output}")
        if self.images is None and self.texts is None:
            raise ValueError("images, texts: expected --images FOLDER, --texts FILE or both")
        if self.output.suffix == ".parquet":
            require("pyarrow.parquet", "parquet")
        paths = [] if self.images is None else find_images(self.images)
        texts = [] if self.texts is None else _lines(self.texts)
        with parallel.ranks(self.device) as ranks:
            made = clip_of(self.model, ranks.device, self.tokenizer, self.activation)
            names, images = self._images(made, paths, ranks.device)
            found = Embedded(names, images, texts, self._texts(made, texts, ranks.device))
        self.output.parent.mkdir(parents=True, exist_ok=True)
        (_write_npz if self.output.suffix == ".npz" else _write_parquet)(self.output, found)
        print(f"{len(names)} images and {len(texts)} texts in {self.output}", flush=True)
        return found

    def _images(self, made: Created, paths: list[Path], device: torch.device):
        if not paths:
            return [], np.empty((0, made.model.config.embed_dim), np.float32)
        features, kept, faults = encode_showing_progress(
            "images", paths, made, self.batch_size, device, show=self.progress
        )
        for fault in faults[:_NAMED]:
            print(f"left out: {fault}")
        if len(faults) > _NAMED:
            print(f"and {len(faults) - _NAMED} more images that cannot be read")
        return [path.relative_to(self.images).as_posix() for path in kept], features.numpy()

    @torch.inference_mode()
    def _texts(self, made: Created, texts: list[str], device: torch.device) -> np.ndarray:
        parts = [np.empty((0, made.model.config.embed_dim), np.float32)]
        if not texts:
            return parts[0]
        with progress("texts", len(texts), "texts", self.progress) as done:
            for at in range(0, len(texts), self.batch_size):
                some = texts[at : at + self.batch_size]
                features = made.model.encode_text(made.tokenizer(some).to(device)).float()
                parts.append(F.normalize(features, dim=-1).cpu().numpy())
                done(len(some))
        return np.concatenate(parts)


def _lines(file: Path) -> list[str]:
    texts = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    texts = [text for text in texts if text]
    if not texts:
        raise ValueError(f"texts: expected a text in each line of {file}, got none")
    return texts


def _write_npz(path: Path, found: Embedded) -> None:
    with atomic_file(path) as file:
        np.savez(
            file,
            images=found.images,
            image_names=np.array(found.image_names, dtype=np.str_),
            text_features=found.text_features,
            texts=np.array(found.texts, dtype=np.str_),
        )


def _write_parquet(path: Path, found: Embedded) -> None:
    arrow, parquet = (require(name, "parquet") for name in ("pyarrow", "pyarrow.parquet"))
    features = np.concatenate([found.images, found.text_features])
    kinds = ["image"] * len(found.images) + ["text"] * len(found.texts)
    rows = arrow.FixedSizeListArray.from_arrays(arrow.array(features.ravel()), features.shape[1])
    table = arrow.table(
        {"kind": kinds, "name": [*found.image_names, *found.texts], "features": rows}
    )
    with atomic_file(path) as file:
        parquet.write_table(table, file)


def parse(options: Sequence[str], prog: str = "fastvlp embed") -> Embed:
    """The command that ``options`` spell."""
    return tyro.cli(Embed, args=list(options), prog=prog)
