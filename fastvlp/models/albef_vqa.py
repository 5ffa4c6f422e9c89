"""ALBEF's visual question answering: a decoder writes, or ranks, answers to a fused question.

Li et al., arXiv 2107.07651, section 5 and appendix A. The decoder is BERT with causal
self-attention and, in every layer, cross-attention to the fused tokens of the question; it starts
from the weights of the fusion layers and of the text embeddings. An answer is [CLS], its tokens
and [SEP]; each token is predicted from those before it.

    loss = (1 / questions) sum over answers a of weight_a sum over tokens t > 0 of CE(a_t | a_<t)

where CE is against (1 - alpha) the token + alpha the momentum twin's softmax.

Answers are packed and grouped by question, so a question's keys and values are projected once in
each layer for all of its answers, and padding never meets the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlp.models import base
from fastvlp.models.albef_finetuning import (
    FinetuningConfig,
    FusedTowers,
    Texts,
    check_alpha,
    check_count,
    check_evaluating,
)
from fastvlp.models.albef_twin import WithTwin
from fastvlp.models.bert import BertEmbeddings, MlmHead
from fastvlp.nn import FusionLayer
from fastvlp.ops import soft_cross_entropy
from fastvlp.ops._rows import to_device
from fastvlp.ops.packing import PairLayout, TextLayout

DEFAULT_WORKSPACE_BYTES = 256 << 20


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


class VqaNetwork(FusedTowers):
    """The towers and the decoder of answers."""

    def __init__(self, config: FinetuningConfig) -> None:
        super().__init__(config)
        self.text_decoder = TextDecoder(config)
        self.start_decoder()

    @torch.no_grad()
    def start_decoder(self) -> None:
        """The decoder takes the weights of the embeddings and of the fusion layers.

        Keys and values of the cross-attention stay as they are where images and texts differ in
        width: there the fusion layers' have another shape.
        """
        decoder, encoder = self.text_decoder.bert, self.text_encoder.bert
        decoder["embeddings"].load_state_dict(encoder["embeddings"].state_dict())
        for ours, theirs in zip(decoder["encoder"]["layer"], self.text_encoder.fusion, strict=True):
            own = ours.state_dict()
            given = theirs.state_dict().items()
            ours.load_state_dict(own | {k: v for k, v in given if v.shape == own[k].shape})


class Answers(NamedTuple):
    """Answers to questions, and which of their tokens predict the next one."""

    texts: Texts
    question: Tensor  # int64 [answers], on the host
    predicting: Tensor  # int64, packed rows that have a next token
    owner: Tensor  # int64, the answer of each of those rows

    @classmethod
    def make(cls, texts: Texts, question: Tensor) -> Answers:
        rows, owner = _predicting(texts.layout.lengths)
        device = texts.ids.device
        return cls(texts, question, to_device(rows, device), to_device(owner, device))

    def labels(self) -> Tensor:
        """The next token of each predicting row."""
        return self.texts.layout.pack(self.texts.ids).long()[self.predicting + 1]


def _predicting(lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Packed rows that are not the last of their text, and their texts."""
    counts = torch.tensor(lengths)
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
    last = torch.zeros(len(owner), dtype=torch.bool)
    last[counts.cumsum(0) - 1] = True
    rows = (~last).nonzero()[:, 0]
    return rows, owner[rows]


class Ranking(NamedTuple):
    """The best answers to each question, best first."""

    answers: Tensor  # int64 [questions, k], rows of the answer list
    log_probs: Tensor  # [questions, k], at least float32


class AlbefVqa(WithTwin):
    """Answers to questions about images.

    Attributes:
        student: the towers and `text_decoder`.
        momentum: the twin of both, None without `distill`.
    """

    kind = "albef-vqa"

    def __init__(self, config: FinetuningConfig) -> None:
        super().__init__(config, VqaNetwork(config), twin=config.distill)

    def forward(self, *args, **kwargs) -> Tensor:
        """`loss`, so that a wrapper such as DistributedDataParallel can call it."""
        return self.loss(*args, **kwargs)

    def loss(
        self,
        images: Tensor,
        text_ids: Tensor,
        text_mask: Tensor | list[int],
        answer_ids: Tensor,
        answer_mask: Tensor | list[int],
        question_of_answer: Tensor | Sequence[int],
        weights: Tensor,
        alpha: Tensor | float = 0.4,
        *,
        update: bool = True,
        momentum_updated: bool = False,
    ) -> Tensor:
        """The weighted language modelling loss of the answers, a mean over questions.

        Args:
            images: [n, 3, image_size, image_size], normalised.
            text_ids, text_mask: the n questions, int [n, length] and bool [n, length] or lengths.
            answer_ids, answer_mask: the same of any number of answers.
            question_of_answer: whole numbers [answers], the row of each answer's question.
            weights: [answers] floating point, such as the share of people who gave the answer.
            alpha: weight of the twin, 0 to 1; without one it has no effect.
            update: move the twin first.
            momentum_updated: the optimiser has moved it already (`AdamWEma(ema=...)`).

        Masks and `question_of_answer` are best on the host.

        Raises:
            TypeError, ValueError: an argument is not as described; the twin has not moved.
        """
        check_alpha(alpha)
        questions = self._questions(images, text_ids, text_mask)
        texts = Texts.make(self.config, answer_ids, answer_mask, images.device, "answer")
        question = torch.as_tensor(question_of_answer).cpu()
        if (
            len(question) != len(texts.ids)
            or (question < 0).any()
            or (question >= len(images)).any()
        ):
            raise ValueError(
                f"question_of_answer: expected 0 to {len(images) - 1} for each of "
                f"{len(texts.ids)} answers, got {question.tolist()}"
            )
        if weights.shape != question.shape or not weights.is_floating_point():
            raise ValueError(
                f"weights: expected floating point {list(question.shape)}, got {weights.dtype} "
                f"{list(weights.shape)}"
            )
        answers = Answers.make(texts, question)
        self.move_twin(update and not momentum_updated)
        losses = (_plain_losses if self.reference else _losses)(
            self, images, questions, answers, alpha
        )
        weights = weights.to(losses)[answers.owner]
        return (weights * losses).sum() / len(images)

    @torch.no_grad()
    def rank_answers(
        self,
        images: Tensor,
        text_ids: Tensor,
        text_mask: Tensor | list[int],
        answer_ids: Tensor,
        answer_mask: Tensor | list[int],
        k: int = 128,
        *,
        count_first_twice: bool = False,
        workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    ) -> Ranking:
        """The k answers of a list whose first token is likeliest, ranked by their whole likelihood.

        Args:
            images, text_ids, text_mask: as in `loss`.
            answer_ids, answer_mask: the list; all begin with one and the same token, and have
                another one.
            k: at most that many.
            count_first_twice: add the first token's log-probability to that of the whole answer,
                which contains it already. The authors' code does so.
            workspace_bytes: about how much memory the decoder may use at a time.

        Raises:
            TypeError, ValueError: an argument is not as described.
            RuntimeError: the model is in training mode.
        """
        check_evaluating(self)
        questions = self._questions(images, text_ids, text_mask)
        answers = Texts.make(self.config, answer_ids, answer_mask, images.device, "answer")
        if not len(answers.ids) or min(answers.layout.lengths) < 2:
            raise ValueError("answer_mask: expected two tokens or more in every answer")
        if (answers.ids[:, 0] != answers.ids[0, 0]).any():
            raise ValueError("answer_ids: expected the same first token in every answer")
        if type(k) is not int or k < 1:
            raise ValueError(f"k: expected a whole number above 0, got {k!r}")
        fused = self.student.encode_pairs(images, questions, self.reference)
        width, size = self.config.text_width, fused.element_size()
        rank = _PlainRanker if self.reference else _Ranker
        ranker = rank(self.student.text_decoder, fused, questions, answers)
        first, chosen = ranker.first_token().topk(min(k, len(answers.ids)), dim=1)
        # Beside the logits, a row takes its own state and a layer's intermediate results.
        rows = max(1, workspace_bytes // (12 * width * size))
        parts = [ranker.whole(chosen[c], c) for c in _chunks(chosen.cpu(), answers, rows)]
        scores = torch.cat(parts)
        if count_first_twice:
            scores = scores + first
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        return Ranking(chosen.gather(1, order), scores)

    def _questions(self, images: Tensor, ids: Tensor, mask: Tensor | list[int]) -> Texts:
        self.student.visual_encoder._check(images)
        texts = Texts.make(self.config, ids, mask, images.device)
        check_count(images, texts)
        return texts


def _hidden(network: VqaNetwork, images: Tensor, questions: Texts, answers: Answers) -> Tensor:
    """What predicts each next token, before the vocabulary, in the order of the answers."""
    fused = network.encode_pairs(images, questions, reference=False)
    layout, decoder = answers.texts.layout, network.text_decoder
    order = torch.arange(len(layout.lengths))
    pairs = PairLayout.make(layout, order, answers.question, len(questions.ids))
    x = decoder.decode(pairs.expand(decoder.embed(answers.texts)), pairs, fused, questions.layout)
    return decoder.predictions(pairs.select(order)(x)[answers.predicting])


def _losses(model: AlbefVqa, images, questions: Texts, answers: Answers, alpha) -> Tensor:
    """Of each predicting row."""
    head = model.student.text_decoder.predictions
    taught = {}
    if model.momentum is not None:
        twin = model.teacher.text_decoder.predictions
        with torch.no_grad():
            taught = {
                "teacher_hidden": _hidden(model.teacher, images, questions, answers),
                "teacher_weight": twin.decoder.weight,
                "teacher_bias": twin.bias,
                "alpha": alpha,
            }
    hidden = _hidden(model.student, images, questions, answers)
    return soft_cross_entropy(
        hidden, head.decoder.weight, head.bias, answers.labels(), reduction="none", **taught
    )


def _plain_logits(network: VqaNetwork, images, questions: Texts, answers: Answers) -> Tensor:
    fused = network.encode_pairs(images, questions, reference=True)
    own, texts = answers.question.to(fused.device), answers.texts
    logits = network.text_decoder.logits_padded(
        texts.ids, texts.mask, fused[own], questions.mask[own]
    )
    return logits[texts.mask][answers.predicting]


def _plain_losses(model: AlbefVqa, images, questions: Texts, answers: Answers, alpha) -> Tensor:
    """`_losses` of padded answers, each with a copy of its question, and all logits."""
    logits = _plain_logits(model.student, images, questions, answers)
    hard = F.cross_entropy(logits, answers.labels(), reduction="none")
    if model.momentum is None:
        return hard
    with torch.no_grad():
        taught = _plain_logits(model.teacher, images, questions, answers).softmax(-1)
    return (1 - alpha) * hard + alpha * F.cross_entropy(logits, taught, reduction="none")


def _chunks(chosen: Tensor, answers: Texts, rows: int) -> Iterator[slice]:
    """Runs of questions whose chosen answers together have at most so many tokens, one at least."""
    tokens = torch.tensor(answers.layout.lengths)[chosen].sum(1).tolist()
    begin = total = 0
    for i, count in enumerate(tokens):
        if i > begin and total + count > rows:
            yield slice(begin, i)
            begin = i
            total = 0
        total += count
    yield slice(begin, len(tokens))


class _Ranker:
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
        rows, _ = _predicting(lengths.tolist())
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


class _PlainRanker(_Ranker):
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


def create(name: str, **overrides) -> AlbefVqa:
    """A freshly initialised model of a named size of `albef.CONFIGS`."""
    return AlbefVqa(FinetuningConfig.named(name, **overrides))


def load(path: str | Path) -> AlbefVqa:
    """The model that ``base.save(model, path)`` wrote, on the CPU, in evaluation mode."""
    return base.load(path, AlbefVqa.kind)
