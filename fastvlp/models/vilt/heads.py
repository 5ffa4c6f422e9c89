"""ViLT's heads and objectives, of pretraining and of the downstream tasks.

Kim, Son, Kim, arXiv 2102.03334, sections 3.2, 3.3 and 4.3. Pretraining is the sum of masked
language modelling on one forward, and of image-text matching and word-patch alignment on another,
whose images are replaced by others for half of the texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlp.models.base import mean_cross_entropy
from fastvlp.models.layers.bert import MlmHead
from fastvlp.models.vilt.packing import ImageTokens, Sequences, lengths_of
from fastvlp.models.vilt.patches import ImageBatch
from fastvlp.nn import LayerNorm
from fastvlp.ops import (
    alignment_padding,
    select_rows,
    soft_cross_entropy,
    word_patch_alignment,
    word_patch_alignment_loss,
    word_patch_alignment_reference,
)
from fastvlp.ops.packing.rows import to_device

TASKS = ("mlm", "itm", "vqa", "nlvr2", "retrieval", "tokens")
# The class of pairs that belong together, in image-text matching.
MATCH = 1


def add(model: nn.Module, config: Any) -> None:
    """Give the model the heads of its tasks, by the original's names."""
    width = config.width
    if "mlm" in config.tasks:
        model.mlm_score = MlmHead(width, config.vocab_size)
    if "itm" in config.tasks:
        model.itm_score = nn.ModuleDict({"fc": nn.Linear(width, 2)})
        initialise(model.itm_score)
    if "vqa" in config.tasks:
        model.vqa_classifier = _classifier(width, 2 * width, config.answers)
    if "nlvr2" in config.tasks:
        model.nlvr2_classifier = _classifier(2 * width, 2 * width, 2)
    if "retrieval" in config.tasks:
        model.rank_output = nn.Linear(width, 1)
        initialise(model.rank_output)
        if "itm" in config.tasks:
            model.rank_by_matching()
    if "tokens" in config.tasks:
        model.token_classifier = nn.Linear(width, config.token_labels)
        initialise(model.token_classifier)


def _classifier(width: int, hidden: int, classes: int) -> nn.Sequential:
    layers = nn.Sequential(
        nn.Linear(width, hidden), LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, classes)
    )
    initialise(layers)
    return layers


def initialise(module: nn.Module) -> None:
    """The original's: weights N(0, 0.02), biases 0; layer norms are so already."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Embedding):
            nn.init.normal_(layer.weight, std=0.02)
        if isinstance(layer, nn.Linear):
            nn.init.zeros_(layer.bias)


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """For what is float32 whatever the rest is."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def draw_matches(n: int, seed: int | None = None) -> Tensor:
    """Which of n pairs of image-text matching keep their image: bool [n], n // 2 of them, shuffled.

    On the host. None draws from torch's generator.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return torch.randperm(n, generator=generator) < n // 2


def vqa_targets(
    labels: Sequence[Sequence[int]],
    scores: Sequence[Sequence[float]],
    answers: int,
    device: torch.device | str | None = None,
) -> Tensor:
    """[n, answers], the score of each accepted answer and 0 for others."""
    targets = torch.zeros(len(labels), answers)
    for row, accepted, score in zip(targets, labels, scores, strict=True):
        row[list(accepted)] = torch.tensor(score, dtype=torch.float32)
    return targets.to(device)


class Objectives:
    """The methods of `Vilt` that say something about pairs. Each needs the head of its task.

    `text` is [n] lengths or a mask [n, length], as in `Vilt.encode`; losses are float32, or float64
    for a float64 model.
    """

    def pretraining_losses(
        self,
        tokens: Tensor,
        text: Sequence[int] | Tensor | None,
        masked_tokens: Tensor,
        mlm_labels: Tensor,
        images: ImageBatch,
        false_images: ImageBatch,
        *,
        matches: Sequence[bool] | Tensor | None = None,
        seed: int | None = None,
        share_images: bool = False,
        max_masked: int | None = None,
    ) -> dict[str, Tensor]:
        """All of pretraining.

        Args:
            tokens: [n, length], unmasked.
            masked_tokens, mlm_labels: [n, length]; the label is -100 where nothing is predicted.
            images: the texts' images.
            false_images: an image for each text that does not belong to it, on any canvas.
            matches: bool [n], the texts that keep their image; None draws half of them.
            seed: of `matches` and of the random subsets of patches; None draws.
            share_images: use one embedding of an image in both forwards. The original embeds it
                again, with other dropout and another subset of patches.
            max_masked: see `mlm_loss`.

        Returns:
            "mlm_loss", "itm_loss", "itm_wpa_loss" and "loss", their sum with equal weights.
        """
        if matches is None:
            matches = draw_matches(len(tokens), seed)
        matches = torch.as_tensor(matches).cpu().bool()
        text = lengths_of(tokens, text)
        seeds = [None if seed is None else 3 * seed + i for i in range(3)]
        embedded = self.embed_images(images, seed=seeds[0])
        masked = self.encode(masked_tokens, embedded, text)
        kept, replaced = matches.nonzero()[:, 0], (~matches).nonzero()[:, 0]
        index = torch.empty(len(tokens), dtype=torch.int64)
        false = self.embed_images(false_images.take(replaced), seed=seeds[2])
        if share_images:
            index[kept] = kept
        else:
            embedded = self.embed_images(images.take(kept), seed=seeds[1])
            index[kept] = torch.arange(len(kept))
        index[replaced] = len(embedded.lengths) + torch.arange(len(replaced))
        pairs = self.encode(tokens, embedded.join(false), text, image_index=index)
        losses = {
            "mlm_loss": self.mlm_loss(masked, mlm_labels, max_masked=max_masked),
            **self.matching_losses(pairs, matches),
        }
        return losses | {"loss": sum(losses.values())}

    def mlm_loss(
        self, sequences: Sequences, labels: Tensor, *, max_masked: int | None = None
    ) -> Tensor:
        """Mean cross entropy of the labelled tokens, 0 where there are none.

        Args:
            sequences: of the masked tokens, from `Vilt.encode`.
            labels: [n, length], -100 where nothing is predicted.
            max_masked: an upper bound of the number of labels, so that nothing waits for a GPU to
                count them.
        """
        head = self.mlm_score
        rows, labels = sequences.packed_text(labels)
        if self.reference:
            logits = head.logits(self.transformer.norm(rows))
            logits = logits if logits.dtype == torch.float64 else logits.float()
            total = F.cross_entropy(logits, labels.long(), ignore_index=-100, reduction="sum")
            return total / (labels != -100).sum().clamp(min=1)
        # Norm and head are needed at the labelled tokens only.
        labels, rows = select_rows(labels, rows, max_rows=max_masked)
        hidden = head(self.transformer.norm(rows))
        return soft_cross_entropy(
            hidden, head.decoder.weight, head.bias, labels, max_rows=len(labels)
        )

    def matching_losses(self, sequences: Sequences, matches: Tensor) -> dict[str, Tensor]:
        """Image-text matching, and word-patch alignment on the same forward.

        Args:
            matches: bool [n], the pairs that belong together.
        """
        if matches.device != sequences.rows.device:
            matches = to_device(matches, sequences.rows.device)
        logits = self.match_logits(sequences)
        target = torch.where(matches, MATCH, 1 - MATCH)
        distance = self.alignment(sequences)
        return {
            "itm_loss": mean_cross_entropy(_wide(logits), target),
            "itm_wpa_loss": word_patch_alignment_loss(distance, matches),
        }

    def alignment(self, sequences: Sequences) -> Tensor:
        """[n], the transport distance between words and patches of each pair.

        Without [CLS] and the last token of the text and without the image's class token.
        """
        normed = sequences.map(self.transformer.norm)
        words, patches = normed.text(), normed.image()
        lengths = torch.tensor([sequences.text_lengths, sequences.image_lengths], dtype=torch.int64)
        lengths = to_device(lengths, words.device)
        padding = alignment_padding(*lengths, words.shape[1], patches.shape[1])
        distance = word_patch_alignment_reference if self.reference else word_patch_alignment
        with without_autocast(words.device):
            return distance(words, patches, *padding)

    def match_logits(self, sequences: Sequences) -> Tensor:
        """[n, 2]; row `MATCH` of the head speaks for pairs that belong together."""
        return self.itm_score["fc"](self.pool(sequences))

    def token_logits(self, sequences: Sequences) -> Tensor:
        """[n, length, token_labels], of each text token."""
        words = sequences.map(self.transformer.norm).text()
        words = F.dropout(words, self.config.dropout, self.training)
        return self.token_classifier(words)

    def vqa_logits(self, sequences: Sequences) -> Tensor:
        """[n, answers]"""
        return self.vqa_classifier(self.pool(sequences))

    def vqa_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Binary cross entropy summed over the answers, mean over questions.

        targets: [n, answers], see `vqa_targets`.
        """
        logits = _wide(logits)
        loss = F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype))
        return loss * targets.shape[1]

    def nlvr2_logits(
        self,
        tokens: Tensor,
        text: Sequence[int] | Tensor | None,
        first: ImageTokens,
        second: ImageTokens,
    ) -> Tensor:
        """[n, 2], whether each statement is true of its two images: two passes, one for each."""
        text = lengths_of(tokens, text)
        pooled = [
            self.pool(self.encode(tokens, images, text, image_type=kind))
            for kind, images in ((1, first), (2, second))
        ]
        return self.nlvr2_classifier(torch.cat(pooled, -1))

    def nlvr2_loss(self, logits: Tensor, answers: Tensor) -> Tensor:
        """answers: [n], 1 where the statement is true."""
        return F.cross_entropy(_wide(logits), answers.long())

    def rank_scores(self, sequences: Sequences) -> Tensor:
        """[n], how well text and image of each pair match; for ranking."""
        return self.rank_output(self.pool(sequences))[:, 0]

    def retrieval_loss(
        self, tokens: Tensor, text: Sequence[Sequence[int]] | Tensor | None, images: ImageTokens
    ) -> Tensor:
        """Cross entropy of each image's own text among its texts; an image is embedded once.

        Args:
            tokens: [n, texts, length], the image's own text first, then false ones; the original
                draws 15.
            text: [n, texts] lengths, or a mask [n, texts, length].
        """
        n, count = tokens.shape[:2]
        if text is not None:
            text = torch.as_tensor(text).flatten(0, 1)
        index = torch.arange(n).repeat_interleave(count)
        sequences = self.encode(tokens.flatten(0, 1), images, text, image_index=index)
        scores = _wide(self.rank_scores(sequences)).unflatten(0, (n, count))
        return F.cross_entropy(scores, torch.zeros(n, dtype=torch.int64, device=scores.device))

    @torch.no_grad()
    def rank_by_matching(self) -> None:
        """Start ranking from what image-text matching has learned."""
        self.rank_output.weight.copy_(self.itm_score["fc"].weight[MATCH:])
        self.rank_output.bias.copy_(self.itm_score["fc"].bias[MATCH:])


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
