"""The decoder of ALBEF's visual question answering, and the likelihoods of answers by it.

Li et al., arXiv 2107.07651, section 5 and appendix A; `fastvlp.models.albef.tasks.vqa` trains it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastvlp.models.albef.tasks.common import FinetuningConfig, Texts
from fastvlp.models.layers.bert import BertEmbeddings, MlmHead
from fastvlp.nn import FusionLayer
from fastvlp.ops import soft_cross_entropy
from fastvlp.ops.packing import PairLayout, TextLayout
from fastvlp.ops.packing.rows import to_device


class TextDecoder(nn.Module):
    """BERT that writes: it attends to its own past and to the fused tokens of a question."""

    def __init__(self, config: FinetuningConfig) -> None:
        super().__init__()
        width = config.text_width
        layers = nn.ModuleList(
            FusionLayer(
                width,
                config.text_heads,
                dropout=config.dropout,
                attention_dropout=config.attention_dropout,
            )
            for _ in range(config.fusion_layers)
        )
        embeddings = BertEmbeddings(
            config.vocab_size, width, config.text_positions, dropout=config.dropout
        )
        self.bert = nn.ModuleDict(
            {"embeddings": embeddings, "encoder": nn.ModuleDict({"layer": layers})}
        )
        self.cls = nn.ModuleDict({"predictions": MlmHead(width, config.vocab_size)})
        self.predictions.decoder.weight = embeddings.word_embeddings.weight

    @property
    def predictions(self) -> MlmHead:
        return self.cls["predictions"]

    def embed(self, texts: Texts) -> Tensor:
        """[tokens, width], packed."""
        ids, layout = texts.ids, texts.layout
        positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        return self.bert["embeddings"](layout.pack(ids), layout.pack(positions))

    def decode(self, x: Tensor, pairs: PairLayout, questions: Tensor, layout: TextLayout) -> Tensor:
        """Embedded answers grouped by question, and packed questions, to decoded answers."""
        for layer in self.bert["encoder"]["layer"]:
            x = layer(
                x,
                pairs.cu_seqlens_pairs,
                questions,
                pairs.cu_seqlens_images,
                cu_seqlens_keys=layout.cu_seqlens,
                causal=True,
                max_seqlen_pairs=pairs.max_seqlen_pairs,
                max_seqlen_images=pairs.max_seqlen_images,
                max_seqlen_keys=layout.max_seqlen,
            )
        return x

    def logits_padded(
        self, ids: Tensor, mask: Tensor, questions: Tensor, question_mask: Tensor
    ) -> Tensor:
        """The plain form: each answer's padded question, logits [answers, length, vocabulary]."""
        x = self.bert["embeddings"](ids)
        for layer in self.bert["encoder"]["layer"]:
            x = layer.padded(x, mask, questions, key_mask=question_mask, causal=True)
        return self.predictions.logits(x)


def predicting_rows(lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Packed rows that are not the last of their text, and their texts."""
    counts = torch.tensor(lengths, dtype=torch.int64)
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
    last = torch.zeros(len(owner), dtype=torch.bool)
    last[counts.cumsum(0) - 1] = True
    rows = (~last).nonzero()[:, 0]
    return rows, owner[rows]


class Ranker:
    """Log-probabilities of answers from a list, to packed fused questions."""

    def __init__(self, decoder: TextDecoder, fused: Tensor, questions: Texts, answers: Texts):
        self.decoder, self.fused, self.answers = decoder, fused, answers
        self.questions = questions
        self.embedded = self._embed()

    def _embed(self) -> Tensor:
        return self.decoder.embed(self.answers)

    def first_token(self) -> Tensor:
        """Of each answer's first token after the start, [questions, answers]."""
        count, layout = len(self.questions.ids), self.questions.layout
        starts = TextLayout.from_lengths([1] * count, 1, self.fused.device)
        own = torch.arange(count)
        pairs = PairLayout.make(starts, own, own, count)
        x = self.embedded[:1].expand(count, -1)
        return self._of_first(self.decoder.decode(x, pairs, self.fused, layout))

    def _of_first(self, x: Tensor) -> Tensor:
        logits = self.decoder.predictions.logits(x)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        second = self.answers.layout.pack(self.answers.ids)
        second = second[self.answers.layout.cu_seqlens[:-1].long() + 1].long()
        return wide.log_softmax(-1).index_select(1, second)

    def whole(self, chosen: Tensor, part: slice) -> Tensor:
        """Of whole answers `chosen` [n, k] to the n questions of `part`."""
        questions, layout = self._part(part)
        text = chosen.cpu().flatten()
        count, k = chosen.shape
        question = torch.repeat_interleave(torch.arange(count), k)
        pairs = PairLayout.make(self.answers.layout, text, question, count)
        x = self.decoder.decode(pairs.expand(self.embedded), pairs, questions, layout)
        lengths = torch.tensor(self.answers.layout.lengths)[text]
        rows, _ = predicting_rows(lengths.tolist())
        rows = to_device(rows, x.device)
        ids = pairs.expand(self.answers.layout.pack(self.answers.ids))
        head = self.decoder.predictions
        losses = soft_cross_entropy(
            head(x[rows]), head.decoder.weight, head.bias, ids[rows + 1].long(), reduction="none"
        )
        predicted = TextLayout.from_lengths(lengths - 1, int(lengths.max()) - 1, x.device)
        return -predicted.unpack(losses).sum(1).view(count, k)

    def _part(self, part: slice) -> tuple[Tensor, TextLayout]:
        lengths = torch.tensor(self.questions.layout.lengths)
        begin, end = int(lengths[: part.start].sum()), int(lengths[: part.stop].sum())
        layout = TextLayout.from_lengths(lengths[part], int(lengths.max()), self.fused.device)
        return self.fused[begin:end], layout


class PlainRanker(Ranker):
    """The same of padded answers, a copy of the question for each."""

    def _embed(self) -> None:
        return None

    def first_token(self) -> Tensor:
        count = len(self.questions.ids)
        start = self.answers.ids[:1, :1].expand(count, 1)
        mask = torch.ones_like(start, dtype=torch.bool)
        logits = self.decoder.logits_padded(start, mask, self.fused, self.questions.mask)
        packed = self.answers.ids[self.answers.mask]
        second = packed[self.answers.layout.cu_seqlens[:-1].long() + 1]
        return logits[:, 0].log_softmax(-1)[:, second]

    def whole(self, chosen: Tensor, part: slice) -> Tensor:
        count, k = chosen.shape
        ids, mask = (t[chosen.flatten()] for t in (self.answers.ids, self.answers.mask))
        own = torch.arange(len(self.fused), device=ids.device)[part].repeat_interleave(k)
        logits = self.decoder.logits_padded(ids, mask, self.fused[own], self.questions.mask[own])
        found = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None].long())[..., 0]
        return (found * mask[:, 1:]).sum(1).view(count, k)
