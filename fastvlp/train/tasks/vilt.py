"""ViLT's task: masked language modelling, image-text matching and word-patch alignment."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlp.data.text import BertTokenizer
from fastvlp.models import base, vilt
from fastvlp.models.vilt.heads import MATCH, draw_matches
from fastvlp.models.vilt.packing import ImageTokens
from fastvlp.models.vilt.patches import ImageBatch
from fastvlp.train import parallel
from fastvlp.train.parallel import Ranks
from fastvlp.train.tasks.base import Task
from fastvlp.train.tasks.data import split_pairs


class PretrainingVilt(vilt.Vilt):
    """A `Vilt` whose forward gives the losses, as wrappers that synchronise ranks need it."""

    def forward(self, *args, **kwargs) -> dict[str, Tensor]:
        return self.pretraining_losses(*args, **kwargs)


class ViltTask(Task):
    """Pretrains a `Vilt` and evaluates it by the accuracy of its matching head.

    The image of a pair that does not match is another one of the batch, chosen at random
    from the data.

    Args:
        model: the model.
        tokenizer: of the captions; the loaders' tokenizer masks what it gives.
        ranks: the processes of the run.
        held_out: loaders of held-out pairs by name, not shuffled.
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
        # An image that has no other one in the batch stays with its text.
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

    def split(self, batch: Any, rows: int, least: int = 1) -> Iterable[tuple[Any, float]]:
        return split_pairs(batch, rows, least)

    def blocks(self) -> list[nn.Module]:
        return list(self.model.transformer.blocks)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Accuracy of matching for each held-out set, see `matching_accuracy`."""
        return {
            f"{name}/{key}": value
            for name, loader in self.held_out.items()
            for key, value in matching_accuracy(model, self.tokenizer, loader, self.ranks).items()
        }

    def save_tokenizer(self, folder: Path) -> None:
        self.tokenizer.save(folder / "vocab.txt")

    def save(self, model: nn.Module, folder: Path) -> None:
        """Writes model.safetensors, model.json and vocab.txt."""
        base.save(model, folder / "model")
        self.save_tokenizer(folder)


def partners(ids: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """For each pair another one, drawn among those of other ids; -1 where none is.

    On the host, int64 [n].
    """
    n = len(ids)
    _, group, counts = ids.cpu().unique(return_inverse=True, return_counts=True)
    order, first = group.argsort(stable=True), (counts.cumsum(0) - counts)[group]
    own = counts[group]
    place = (torch.rand(n, generator=generator, dtype=torch.float64) * (n - own)).long()
    # In the order by id: those of the pair's own id lie side by side and are left out.
    place += own * (place >= first)
    return order[place.clamp(max=n - 1)].where(own < n, -1)


@torch.inference_mode()
def matching_accuracy(
    model: nn.Module, tokenizer: BertTokenizer, loader: Any, ranks: Ranks
) -> dict[str, float]:
    """How often the matching head is right about an image with its own and with a wrong caption.

    "matching/loss" is the mean of its cross-entropy over both.

    Each image of a held-out set is judged with its caption and with that of another image,
    drawn from the whole set and always the same one; half of the judgements are "match".

    Args:
        tokenizer: without masking.
        loader: of held-out pairs.

    Raises:
        ValueError: there is no pair.
    """
    loader.load_state_dict({**loader.state_dict(), "epoch": 0, "place": 0})
    parts, pairs = [], {}
    for batch in parallel.loading_together(loader, ranks.group):
        # Also where it has no pairs: a sharded model computes on all ranks together.
        images = model.embed_images(ImageBatch(batch.images, batch.pixel_mask))
        parts.append((batch.index.tolist(), images))
        about = zip(batch.ids.tolist(), batch.captions, strict=True)
        pairs |= zip(batch.index.tolist(), about, strict=True)
    pairs = parallel.gathered(pairs, ranks)
    if not pairs:
        raise ValueError("loader: expected at least one pair to judge, got none")
    ids = torch.tensor([id_ for id_, _ in pairs.values()])
    captions = [caption for _, caption in pairs.values()]
    partner = partners(ids, torch.Generator().manual_seed(0)).tolist()
    wrong = {i: captions[p] for i, p in zip(pairs, partner, strict=True) if p >= 0}
    counts = torch.zeros(5, dtype=torch.float64)
    for index, images in parts:
        true = [pairs[i][1] for i in index]
        counts += _judged(model, tokenizer, images, true, [wrong.get(i) for i in index])
    if ranks.group is not None:
        counts = counts.to(ranks.device)
        dist.all_reduce(counts, group=ranks.group)
    right, matching, right_wrong, mismatched, loss = counts.tolist()
    return {
        "matching/accuracy": (right + right_wrong) / (matching + mismatched),
        "matching/accuracy_matched": right / matching,
        "matching/accuracy_mismatched": right_wrong / max(1.0, mismatched),
        "matching/loss": loss / (matching + mismatched),
    }


def _judged(
    model: nn.Module,
    tokenizer: BertTokenizer,
    images: ImageTokens,
    true: list[str],
    wrong: list[str | None],
) -> Tensor:
    """Right judgements of true captions, their number, the same of wrong captions, and the sum of
    the cross-entropy over all of them."""
    n, device = len(true), images.rows.device
    has_wrong = [row for row, caption in enumerate(wrong) if caption is not None]
    text = tokenizer.padded([*true, *(wrong[row] for row in has_wrong)])
    sequences = model.encode(
        text.ids.to(device),
        images,
        text.mask.sum(1).tolist(),
        image_index=[*range(n), *has_wrong],
    )
    logits = model.match_logits(sequences).float().cpu()
    says_match = logits.argmax(1) == MATCH
    right, right_wrong = says_match[:n].sum(), (~says_match[n:]).sum()
    labels = torch.tensor([MATCH] * n + [1 - MATCH] * len(has_wrong), dtype=torch.int64)
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return torch.tensor([right, n, right_wrong, len(has_wrong), loss], dtype=torch.float64)
