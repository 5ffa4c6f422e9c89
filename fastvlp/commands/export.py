"""``fastvlp export``: a trained CLIP for open_clip or transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from fastvlp.commands.search import clip_of
from fastvlp.data.text import ClipTokenizer, save_for_transformers
from fastvlp.models.checkpoints.export import Target, export_clip

# Entries of CLIP's own vocabulary, which open_clip brings.
_CLIPS_OWN = 49408
_LOADING = {
    "open_clip": 'open_clip.create_model_and_transforms("local-dir:{0}")',
    "transformers": 'transformers.CLIPModel.from_pretrained("{0}")',
}


@dataclass
class Export:
    """Write a trained CLIP as a folder that open_clip or transformers loads.

    Weights, sizes, the normalisation of images and the tokenizer; features are equal.
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Folder of a run of `fastvlp train clip`, or a published checkpoint of CLIP, file or
    folder."""

    to: Target
    """The library that is to load it."""

    output: Path | None = None
    """Folder to write. By default one of the library's name in that of the model."""

    tokenizer: Path | None = None
    """Vocabulary of the captions. By default that of the run, beside the model, or CLIP's own."""

    activation: str | None = None
    """Of weights from open_clip, which do not tell it: gelu or quick_gelu."""

    def run(self) -> Path:
        """Export, print how to load it, and give the folder."""
        made = clip_of(self.model, torch.device("cpu"), self.tokenizer, self.activation)
        path = Path(self.model)
        folder = self.output or (path if path.is_dir() else path.parent) / self.to
        recipe, tokenizer = made.preprocess.recipe, made.tokenizer
        known = isinstance(tokenizer, ClipTokenizer) and tokenizer.vocab_size == _CLIPS_OWN
        export_clip(
            made.model,
            folder,
            self.to,
            mean=recipe.mean,
            std=recipe.std,
            eot_id=tokenizer.eot_id,
            own_vocabulary=not known,
        )
        save_for_transformers(tokenizer, folder)
        print(f"exported to {folder}; load it with\n  {_LOADING[self.to].format(folder)}")
        return folder


def parse(options: Sequence[str], prog: str = "fastvlp export") -> Export:
    """The command that ``options`` spell."""
    return tyro.cli(Export, args=list(options), prog=prog)
