"""ALBEF's visual question answering: a decoder writes, or ranks, answers to a fused question.

Li et al., arXiv 2107.07651, section 5 and appendix A. The decoder is BERT with causal
self-attention and, in every layer, cross-attention to the fused tokens of the question; it starts
from typing import Any
from the weights of the fusion layers and of the text embeddings. An answer is [CLS], its tokens
and [SEP]; each token is predicted from those before it.

    loss = (1 / questions) sum over answers a of weight_a sum over tokens t > 0 of CE(a_t | a_<t)

where CE is against (1 - alpha) the token + alpha the momentum encoder's softmax.

Answers are packed and grouped by question, so a question's keys and values are projected once in
each layer for all of its answers, and padding never meets the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvlp.models import base
from fastvlp.models.albef.decoder import PlainRanker, Ranker, TextDecoder, predicting_rows
from fastvlp.models.albef.momentum import WithMomentum
from fastvlp.models.albef.tasks.common import (
    FinetuningConfig,
    FusedTowers,
    Texts,
    check_alpha,
    check_count,
    check_evaluating,
    runs,
)
from fastvlp.ops import soft_cross_entropy
from fastvlp.ops.packing import PairLayout
from fastvlp.ops.packing.rows import to_device

DEFAULT_WORKSPACE_BYTES = 256 << 20


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
        rows, owner = predicting_rows(texts.layout.lengths)
        device = texts.ids.device
        return cls(texts, question, to_device(rows, device), to_device(owner, device))

    def labels(self) -> Tensor:
        """The next token of each predicting row."""
        return self.texts.layout.pack(self.texts.ids).long()[self.predicting + 1]


class Ranking(NamedTuple):
    """The best answers to each question, best first."""

    answers: Tensor  # int64 [questions, k], rows of the answer list
    log_probs: Tensor  # [questions, k], at least float32


class AlbefVqa(WithMomentum):
    """Answers to questions about images.

    Attributes:
        student: the towers and `text_decoder`.
        momentum: the momentum encoder of both, None without `distill`.
    """

    kind = "albef-vqa"
    config_type = FinetuningConfig

    def __init__(self, config: FinetuningConfig) -> None:
        super().__init__(config, VqaNetwork(config), with_momentum=config.distill)

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
            alpha: weight of the momentum encoder, 0 to 1; without one it has no effect.
            update: move the momentum encoder first.
            momentum_updated: the optimiser has moved it already (`AdamWEma(ema=...)`).

        Masks and `question_of_answer` are best on the host.

        Raises:
            TypeError, ValueError: an argument is not as described; the momentum encoder has not
            moved.
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
        self.update_momentum(update and not momentum_updated)
        losses = (_plain_losses if self.reference else _losses)(
            self, images, questions, answers, alpha
        )
        weights = weights.to(losses)[answers.owner]
        return (weights * losses).sum() / max(len(images), 1)

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
        rank = PlainRanker if self.reference else Ranker
        ranker = rank(self.student.text_decoder, fused, questions, answers)
        first, chosen = ranker.first_token().topk(min(k, len(answers.ids)), dim=1)
        # Beside the logits, a row takes its own state and a layer's intermediate results.
        rows = max(1, workspace_bytes // (12 * width * size))
        tokens = torch.tensor(answers.layout.lengths)[chosen.cpu()].sum(1)
        parts = [ranker.whole(chosen[part], part) for part in runs(tokens, rows)]
        scores = torch.cat(parts)
        if count_first_twice:
            scores = scores + first
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        return Ranking(chosen.gather(1, order), scores)

    def _questions(self, images: Tensor, ids: Tensor, mask: Tensor | list[int]) -> Texts:
        self.student.visual_encoder.check(images)
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
        teacher_head = model.teacher.text_decoder.predictions
        with torch.no_grad():
            taught = {
                "teacher_hidden": _hidden(model.teacher, images, questions, answers),
                "teacher_weight": teacher_head.decoder.weight,
                "teacher_bias": teacher_head.bias,
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


def create(name: str, **overrides: Any) -> AlbefVqa:
    """A freshly initialised model of a named size of `albef.CONFIGS`."""
    return AlbefVqa(FinetuningConfig.named(name, **overrides))


def load(path: str | Path) -> AlbefVqa:
    """The model that ``base.save(model, path)`` wrote, on the CPU, in evaluation mode."""
    return base.load(path, AlbefVqa.kind)
