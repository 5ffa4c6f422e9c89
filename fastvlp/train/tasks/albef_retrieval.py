"""Retrieval by ALBEF: contrastive features, then the matching head on the best candidates.

Li et al., arXiv 2107.07651, section 5: for each picture the k captions, and for each caption the k
pictures, of largest feature product are scored by the logit of "match"; the others come after.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastvlp.data.text import BertTokenizer
from fastvlp.evaluate.features import encode, products
from fastvlp.evaluate.retrieval import retrieval
from fastvlp.ops.packing import PairLayout, TextLayout
from fastvlp.train.parallel import Ranks, gathered

_PAIRS_AT_A_TIME = 2048


@torch.inference_mode()
def retrieval_scores(
    model: nn.Module, tokenizer: BertTokenizer, loader: Any, candidates: int, ranks: Ranks
) -> dict[str, float]:
    """Recalls both ways, by contrast and, with "reranked" before them, by the matching head.

    Args:
        model: an `Albef` in evaluation mode.
        loader: of held-out pairs; its tokens have `ids` and `mask`.
        candidates: scored by the matching head for each query.
    """
    encoder = _Encoder(model, ranks)
    loader.load_state_dict({**loader.state_dict(), "epoch": 0, "place": 0})
    found = encode(
        encoder.watch(loader), encoder.images, encoder.texts, device=ranks.device, group=ranks.group
    )
    pictures, picture = found.pictures()
    ways = retrieval(pictures, found.texts, picture, group=ranks.group)
    similarity = products(found.texts, pictures)
    scores = {f"{way}/{key}": v for way, result in ways.items() for key, v in result.items()}
    chosen = _best(similarity, candidates) | _best(similarity.T, candidates).T
    match = torch.full_like(similarity, -torch.inf)
    match[chosen] = encoder.matching(tokenizer, found.ids, picture, chosen)
    own = picture[:, None] == torch.arange(len(pictures), device=picture.device)
    for way, table, right in (("text_to_image", match, own), ("image_to_text", match.T, own.T)):
        scores |= {f"reranked/{way}/{k}": v for k, v in recalls(table, right).items()}
    return scores


def recalls(scores: Tensor, right: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """The share of queries, rows, of which a right key is among the first k.

    A wrong key of the same score is ranked before the right one.
    """
    best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    ahead = ((scores >= best) & ~right).sum(1)
    return {f"R@{k}": (ahead < k).double().mean().item() for k in ks}


def _best(scores: Tensor, k: int) -> Tensor:
    """Which entries are among the k largest of their row."""
    at = scores.topk(min(k, scores.shape[1]), dim=1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, at, True)


class _Encoder:
    """Encodes pairs and keeps what fusion needs of this rank's: image tokens and all captions."""

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        self.model, self.student, self.ranks = model, model.student, ranks
        self._tokens: list[Tensor] = []
        self._captions: dict[int, str] = {}

    def watch(self, batches: Iterable[Any]) -> Iterator[Any]:
        for batch in batches:
            self._captions |= zip(batch.index.tolist(), batch.captions, strict=True)
            yield batch

    def images(self, images: Tensor) -> Tensor:
        self._tokens.append(self.student.encode_image(images))
        return self.student.image_features(self._tokens[-1])

    def texts(self, text: Any) -> Tensor:
        ids, layout = text.ids.to(self.ranks.device), self._layout(text.mask)
        return self.student.text_features(layout.first(self.student.encode_text(ids, layout)))

    def _layout(self, mask: Tensor) -> TextLayout:
        return TextLayout.from_mask(mask, self.ranks.device)

    def matching(
        self, tokenizer: BertTokenizer, ids: Tensor, picture: Tensor, chosen: Tensor
    ) -> Tensor:
        """The logit of "match" of the chosen (caption, picture), each scored where its picture is.

        Args:
            ids, picture: of all pairs, see `Features`.
            chosen: bool [captions, pictures].
        """
        text, image = chosen.cpu().nonzero(as_tuple=True)
        # A picture is that of the first pair that shows it.
        pair = torch.arange(len(ids))
        first = torch.full((chosen.shape[1],), len(ids)).scatter_reduce(
            0, picture.cpu(), pair, "amin"
        )
        row = torch.full((len(ids),), -1)
        row[list(self._captions)] = torch.arange(len(self._captions))
        row = row[first][image]
        here = (row >= 0).nonzero()[:, 0]
        here = here[row[here].argsort(stable=True)]
        logits = torch.zeros(len(text), device=self.ranks.device)
        logits[here.to(logits.device)] = self._fused(tokenizer, text[here], row[here])
        if self.ranks.group is not None:
            dist.all_reduce(logits, group=self.ranks.group)
        return logits

    def _fused(self, tokenizer: BertTokenizer, text: Tensor, row: Tensor) -> Tensor:
        """Logits of texts with this rank's images, sorted by image."""
        captions = gathered(self._captions, self.ranks)
        padded = tokenizer.padded(list(captions.values()))
        layout = self._layout(padded.mask)
        texts = self.student.encode_text(padded.ids.to(self.ranks.device), layout)
        tokens = torch.cat(self._tokens)
        logits = [torch.zeros(0, device=self.ranks.device)]
        parts = text.split(_PAIRS_AT_A_TIME), row.split(_PAIRS_AT_A_TIME)
        for part, rows in zip(*parts, strict=True):
            distinct, place = rows.unique(return_inverse=True)
            pairs = PairLayout.make(layout, part, place, len(distinct))
            near = tokens[distinct.to(tokens.device)]
            fused = self.student.fuse(pairs.expand(texts), pairs, near)
            logits.append(self.model.itm_head(pairs.first(fused))[:, 1].float())
        return torch.cat(logits)
