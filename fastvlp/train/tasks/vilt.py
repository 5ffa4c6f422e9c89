"""ViLT's task: masked language modelling, image-text matching and word-patch alignment."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastvlp.data.text import BertTokenizer
from fastvlp.models import base, vilt
from fastvlp.models.vilt_heads import MATCH, draw_matches
from fastvlp.models.vilt_patches import ImageBatch
from fastvlp.train.parallel import Ranks
from fastvlp.train.tasks.base import Task
from fastvlp.train.tasks.data import split_pairs


class PretrainingVilt(vilt.Vilt):
    """A `Vilt` whose forward gives the losses, as wrappers that synchronise ranks need it."""

    def forward(self, *args, **kwargs) -> dict[str, Tensor]:
        return self.pretraining_losses(*args, **kwargs)


class ViltTask(Task):
    """Pretrains a `Vilt` and evaluates it by the accuracy of its matching head.

    The image of a pair that does not match is another one of the batch, which is a random draw
    from the data.

    Args:
        model: the model.
        tokenizer: of the captions; the loaders' tokenizer masks what it gives.
        ranks: the processes of the run.
        held_out: loaders of held-out pairs by name, not shuffled, with masked or plain texts.
        chunk_size: pairs that go through the model at a time.
    """

    forward_methods = ("embed_images", "encode", "match_logits")

    def __init__(
        self,
        model: PretrainingVilt,
        tokenizer: BertTokenizer,
        ranks: Ranks,
        *,
        held_out: dict[str, Any] | None = None,
        chunk_size: int | None = None,
        reference: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.ranks = model, tokenizer, ranks
        self.held_out, self.chunk_size = held_out or {}, chunk_size
        model.use_reference(reference)

    def losses(self, model: nn.Module, batch) -> dict[str, Tensor]:
        text, device = batch.tokens, self.ranks.device
        partner = partners(batch.ids)
        # A picture that has no other one in the batch stays with its text.
        matches = draw_matches(len(batch)) | (partner < 0)
        images = ImageBatch(batch.images, batch.pixel_mask)
        return model(
            text.ids.to(device),
            text.mask.sum(1).tolist(),
            text.masked_ids.to(device),
            text.labels.to(device),
            images,
            images.take(partner.clamp(min=0)),
            matches=matches,
        )

    def split(self, batch: Any, rows: int) -> Iterable[tuple[Any, float]]:
        return split_pairs(batch, rows)

    def blocks(self) -> list[nn.Module]:
        return list(self.model.transformer.blocks)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Accuracy of matching for each held-out set, see `matching_accuracy`."""
        return {
            f"{name}/{key}": value
            for name, loader in self.held_out.items()
            for key, value in matching_accuracy(model, loader, self.ranks).items()
        }

    def save(self, model: nn.Module, folder: Path) -> None:
        """Writes model.safetensors, model.json and vocab.txt."""
        base.save(model, folder / "model")
        self.tokenizer.save(folder / "vocab.txt")


def partners(ids: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """For each pair of a batch another one, drawn among those of other ids; -1 where none is.

    On the host, int64 [n].
    """
    ids = ids.cpu()
    draws = torch.rand(len(ids), len(ids), generator=generator)
    best, partner = draws.masked_fill(ids[:, None] == ids, -1.0).max(1)
    return partner.where(best >= 0, -1)


@torch.inference_mode()
def matching_accuracy(model: nn.Module, loader: Any, ranks: Ranks) -> dict[str, float]:
    """How often the matching head is right about a picture with its own and with a wrong caption.

    Each picture of a held-out set is judged with its caption and with the caption of another
    picture of its batch, always the same one; half of the judgements are "match".

    Args:
        loader: of held-out pairs; its tokens have `ids` and `mask`.
    """
    loader.load_state_dict({**loader.state_dict(), "epoch": 0, "place": 0})
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(4, dtype=torch.float64)
    for batch in loader:
        if len(batch):
            counts += _judged(model, batch, ranks.device, generator)
    if ranks.group is not None:
        counts = counts.to(ranks.device)
        dist.all_reduce(counts, group=ranks.group)
    right, matching, right_wrong, wrong = counts.tolist()
    return {
        "matching/accuracy": (right + right_wrong) / (matching + wrong),
        "matching/accuracy_matched": right / matching,
        "matching/accuracy_mismatched": right_wrong / max(1.0, wrong),
    }


def _judged(model, batch, device, generator) -> Tensor:
    """Right judgements of true captions, their number, and the same of wrong captions."""
    text, n = batch.tokens, len(batch)
    partner = partners(batch.ids, generator)
    has_wrong = (partner >= 0).nonzero()[:, 0]
    which = torch.cat([torch.arange(n), partner[has_wrong]])
    images = model.embed_images(ImageBatch(batch.images, batch.pixel_mask))
    sequences = model.encode(
        text.ids[which].to(device),
        images,
        text.mask.sum(1)[which].tolist(),
        image_index=torch.cat([torch.arange(n), has_wrong]),
    )
    says_match = (model.match_logits(sequences).argmax(1) == MATCH).cpu()
    right, right_wrong = says_match[:n].sum(), (~says_match[n:]).sum()
    return torch.tensor([right, n, right_wrong, len(has_wrong)], dtype=torch.float64)
