"""Retrieval by ALBEF: contrastive features, then the matching head on the best candidates.

Li et al., arXiv 2107.07651, section 5: for each image the k captions, and for each caption the k
images, of largest dot product of features are scored by the logit of "match"; the others come
after. Each direction ranks by its own candidates; a pair that both chose is fused once.

Each rank keeps the tokens of the images that it encoded and fuses those with their captions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastvlp.data.text import BertTokenizer
from fastvlp.evaluate.features import encode
from fastvlp.evaluate.retrieval import retrieval, retrieval_from_scores
from fastvlp.models.albef.tasks import rerank as albef_rerank
from fastvlp.ops.packing import TextLayout
from fastvlp.train.parallel import Ranks, gathered


@torch.inference_mode()
def retrieval_scores(
    model: nn.Module,
    tokenizer: BertTokenizer,
    loader: Any,
    candidates: int,
    ranks: Ranks,
    confidence: float | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Recalls in both directions, by contrast and, with "reranked" before them, by the matching
    head.

    Memory: features of all pairs, tokens of all captions and of this rank's images (on the
    host), two matrices of captions by images, and `albef_rerank`'s workspace.

    Args:
        model: an `Albef` in evaluation mode.
        loader: of held-out pairs, not shuffled; its tokens have `ids` and `mask`.
        candidates: scored by the matching head for each query.
        confidence, seed: of intervals, as in `retrieval`.
    """
    encoder = _Encoder(model, ranks)
    loader.load_state_dict({**loader.state_dict(), "epoch": 0, "place": 0})
    found = encode(
        encoder.watch(loader), encoder.images, encoder.texts, device=ranks.device, group=ranks.group
    )
    unique, image_of_text = found.unique_images()
    sure = {"confidence": confidence, "seed": seed}
    directions = retrieval(unique, found.texts, image_of_text, group=ranks.group, **sure)
    scores = {
        f"{direction}/{key}": v
        for direction, result in directions.items()
        for key, v in result.items()
    }
    own, images = encoder.image_set(unique, image_of_text, found.index.cpu())
    texts = encoder.text_set(tokenizer, found.texts, loader.batch_size)
    matched = albef_rerank.rerank(model, images, texts, candidates, group=ranks.group, own=own)
    for direction, result in retrieval_from_scores(*matched, image_of_text, **sure).items():
        scores |= {f"reranked/{direction}/{k}": v for k, v in result.items() if k.startswith("R@")}
    return scores


class _Encoder:
    """Encodes pairs and keeps what fusion needs: tokens of this rank's images, all captions."""

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        self.model, self.student, self.ranks = model, model.student, ranks
        self._tokens: list[Tensor] = []
        # Pairs are known by their places in the data.
        self._captions: dict[int, str] = {}
        # Of each image's first pair on this rank, the row among the tokens.
        self._row: dict[int, int] = {}
        self._seen: set[int] = set()
        self._new: list[int] = []

    def watch(self, batches: Iterable[Any]) -> Iterator[Any]:
        for batch in batches:
            pairs = batch.index.tolist()
            self._captions |= zip(pairs, batch.captions, strict=True)
            self._new = []
            for at, (pair, name) in enumerate(zip(pairs, batch.ids.tolist(), strict=True)):
                if name not in self._seen:
                    self._seen.add(name)
                    self._row[pair] = len(self._row)
                    self._new.append(at)
            yield batch

    def images(self, images: Tensor) -> Tensor:
        tokens = self.student.encode_image(images)
        self._tokens.append(tokens[self._new].cpu())
        return self.student.image_features(tokens)

    def texts(self, text: Any) -> Tensor:
        ids, layout = (
            text.ids.to(self.ranks.device),
            TextLayout.from_mask(text.mask, self.ranks.device),
        )
        return self.student.text_features(layout.first(self.student.encode_text(ids, layout)))

    def image_set(
        self, unique: Tensor, image_of_text: Tensor, index: Tensor
    ) -> tuple[Tensor, albef_rerank.ImageSet]:
        """Which images are this rank's, and their tokens with the features of all.

        An image is that of the first pair that shows it. `index` are the pairs' places in the
        data, where some may be missing among them.
        """
        pairs = torch.arange(len(image_of_text))
        first = torch.full((len(unique),), len(image_of_text))
        first = first.scatter_reduce(0, image_of_text.cpu(), pairs, "amin")
        row = torch.full((len(image_of_text),), -1)
        places, rows = (
            torch.tensor([*each], dtype=torch.int64) for each in (self._row, self._row.values())
        )
        row[torch.searchsorted(index, places)] = rows
        row = row[first]
        own = (row >= 0).nonzero()[:, 0]
        return own, albef_rerank.ImageSet(torch.cat(self._tokens)[row[own]], unique)

    def text_set(
        self, tokenizer: BertTokenizer, features: Tensor, rows: int
    ) -> albef_rerank.TextSet:
        """Tokens of the captions of all ranks, encoded some rows at a time."""
        captions = list(gathered(self._captions, self.ranks).values())
        parts = [captions[i : i + rows] for i in range(0, len(captions), rows)]
        padded = (tokenizer.padded(part) for part in parts)
        texts = albef_rerank.encode_texts(self.model, ((text.ids, text.mask) for text in padded))
        return texts._replace(features=features)
