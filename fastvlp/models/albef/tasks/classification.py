"""ALBEF's classifiers: visual entailment, NLVR2, and NLVR2's text-assignment pretraining.

Li et al., arXiv 2107.07651, section 5 and appendix A. The first fused token of a pair goes through
linear, ReLU, linear to the classes: 3 for visual entailment (one image a text), 2 for NLVR2 (two
images a text).

With two images every fusion layer occurs twice, one after the other: the first of the two attends
to the first image, the second to the second. So the 6 text and 6 fusion layers become 18. Both
start from the same pretrained layer, and keep one and the same projection to keys and values
between them; all their other weights part in training. Here that projection runs once for both,
over the images of all texts.

Text assignment prepares those 18 layers: of a text and two images, is the first, the second, or
neither its own? 3 classes, a linear head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlp.models import base
from fastvlp.models.albef.momentum import WithMomentum
from fastvlp.models.albef.tasks.common import (
    FinetuningConfig,
    FusedTowers,
    Texts,
    check_alpha,
    check_count,
    fuse_first,
)
from fastvlp.nn import FusionLayer
from fastvlp.ops.packing import PairLayout
from fastvlp.ops.packing.rows import RowMap, row_map


@dataclass(frozen=True)
class ClassifierConfig(FinetuningConfig):
    """Settings of a classifier of texts with images.

    Attributes:
        classes: 3 for visual entailment, 2 for NLVR2.
        images: of each text, 1 or 2. With 2 the model has each fusion layer twice;
            `fusion_layers` counts them before that.
    """

    classes: int = 3
    images: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images not in (1, 2):
            raise ValueError(f"images: expected 1 or 2 for each text, got {self.images}")


class TwoImageTowers(FusedTowers):
    """The towers with each fusion layer twice, for two images of one text."""

    def __init__(self, config: FinetuningConfig) -> None:
        super().__init__(dataclasses.replace(config, fusion_layers=2 * config.fusion_layers))
        for first, second in self._layer_pairs():
            for name in ("key", "value"):
                setattr(first.crossattention.self, name, getattr(second.crossattention.self, name))

    def _layer_pairs(self) -> list[tuple[FusionLayer, FusionLayer]]:
        layers = self.text_encoder.fusion
        return list(zip(layers[::2], layers[1::2], strict=True))

    def encode_assigned(
        self, tokens: Tensor, texts: Texts, images: tuple[RowMap, RowMap], reference: bool
    ) -> Tensor:
        """Fused first tokens [texts, text_width].

        Args:
            tokens: image tokens [n, L, vision_width].
            images: which row of `tokens` is each text's first image, and which its second.
        """
        if reference:
            x = self.encode_padded(texts.ids, texts.mask)
            for layers in self._layer_pairs():
                for layer, rows in zip(layers, images, strict=True):
                    x = layer.padded(x, texts.mask, rows(tokens))
            return x[:, 0]
        own = torch.arange(len(texts.ids))
        pairs = PairLayout.make(texts.layout, own, own, len(own))
        x = self.encode_text(texts.ids, texts.layout)
        return fuse_first(self.text_encoder.fusion, x, pairs, self._keys(tokens, images))

    def _keys(self, tokens, images) -> Iterator[tuple[Tensor, Tensor]]:
        for layer, _ in self._layer_pairs():
            keys, values = layer.project_images(tokens)
            for rows in images:
                yield rows(keys), rows(values)


def _classes_head(width: int, classes: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes))


class _OneImageNetwork(FusedTowers):
    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__(config)
        self.cls_head = _classes_head(config.text_width, config.classes)

    def forward(self, images: Tensor, texts: Texts, reference: bool) -> Tensor:
        return self.cls_head(self.encode_first(images, texts, reference))


class _TwoImageNetwork(TwoImageTowers):
    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__(config)
        self.cls_head = _classes_head(config.text_width, config.classes)

    def forward(self, images: Tensor, texts: Texts, reference: bool) -> Tensor:
        count, device = len(images), images.device
        tokens = self.encode_image(images.flatten(0, 1))
        rows = 2 * torch.arange(count)
        places = tuple(row_map(rows + i, 2 * count, device) for i in range(2))
        return self.cls_head(self.encode_assigned(tokens, texts, places, reference))


class AlbefClassifier(WithMomentum):
    """Texts with one or two images into classes.

    Attributes:
        student: the towers and `cls_head`.
        momentum: the momentum encoder of both, None without `distill`.
    """

    kind = "albef-classifier"
    config_type = ClassifierConfig

    def __init__(self, config: ClassifierConfig) -> None:
        network = _OneImageNetwork if config.images == 1 else _TwoImageNetwork
        super().__init__(config, network(config), with_momentum=config.distill)

    def logits(self, images: Tensor, text_ids: Tensor, text_mask: Tensor | list[int]) -> Tensor:
        """Logits of the classes [n, classes], at least float32.

        Args:
            images: [n, 3, image_size, image_size], normalised; with two images a text
                [n, 2, 3, image_size, image_size].
            text_ids: int [n, length], padded.
            text_mask: bool [n, length], true at tokens, or the lengths. Best on the host.

        Raises:
            TypeError, ValueError: an argument is not as described.
        """
        return _wide(self.student(images, self._texts(images, text_ids, text_mask), self.reference))

    def loss(
        self,
        images: Tensor,
        text_ids: Tensor,
        text_mask: Tensor | list[int],
        labels: Tensor,
        alpha: Tensor | float = 0.4,
        *,
        update: bool = True,
        momentum_updated: bool = False,
    ) -> Tensor:
        """Mean cross entropy; with a momentum encoder against (1 - alpha) labels + alpha its
        softmax.

        Args:
            images, text_ids, text_mask: as in `logits`.
            labels: int64 [n].
            alpha: weight of the momentum encoder, 0 to 1; without one it has no effect.
            update: move the momentum encoder first.
            momentum_updated: the optimiser has moved it already (`AdamWEma(ema=...)`).

        Raises:
            TypeError, ValueError: an argument is not as described; the momentum encoder has not
            moved.
        """
        check_alpha(alpha)
        texts = self._texts(images, text_ids, text_mask)
        if labels.shape != (len(images),) or labels.dtype != torch.int64:
            raise ValueError(
                f"labels: expected int64 [{len(images)}], got {labels.dtype} {tuple(labels.shape)}"
            )
        self.update_momentum(update and not momentum_updated)
        taught = None
        if self.momentum is not None:
            with torch.no_grad():
                taught = _wide(self.teacher(images, texts, self.reference)).softmax(-1)
        logits = _wide(self.student(images, texts, self.reference))
        hard = base.mean_cross_entropy(logits, labels)
        if taught is None:
            return hard
        soft = base.mean_cross_entropy(logits, taught.to(logits.dtype))
        return (1 - alpha) * hard + alpha * soft

    def _texts(self, images: Tensor, ids: Tensor, mask: Tensor | list[int]) -> Texts:
        two = self.config.images == 2
        if two and (images.dim() != 5 or images.shape[1] != 2):
            raise ValueError(
                f"images: expected [n, 2, 3, height, width], got {tuple(images.shape)}"
            )
        self.student.visual_encoder.check(images.flatten(0, 1) if two else images)
        texts = Texts.make(self.config, ids, mask, images.device)
        check_count(images, texts)
        return texts


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


class Assignment(NamedTuple):
    """The sampled images of the texts, by their numbers in the batch, on the host."""

    images: Tensor  # int64 [n, 2]
    labels: Tensor  # int64 [n]: 0 the first image is the text's own, 1 the second, 2 neither


class _AssignmentNetwork(TwoImageTowers):
    def __init__(self, config: FinetuningConfig) -> None:
        super().__init__(config)
        self.ta_head = nn.Linear(config.text_width, 3)


class AlbefTextAssignment(WithMomentum):
    """Text-assignment pretraining of the towers that NLVR2 fine-tunes.

    Attributes:
        student: the towers and `ta_head`.
        vision_proj: the pretrained projection of images, by whose similarities other images are
            drawn; it is not trained.
    """

    kind = "albef-text-assignment"
    config_type = FinetuningConfig

    def __init__(self, config: FinetuningConfig) -> None:
        super().__init__(config, _AssignmentNetwork(config), with_momentum=False)
        self.vision_proj = nn.Linear(config.vision_width, config.embed_dim).requires_grad_(False)

    def loss(
        self,
        images: Tensor,
        text_ids: Tensor,
        text_mask: Tensor | list[int],
        *,
        seed: int | None = None,
    ) -> Tensor:
        """Mean cross entropy of the assignment of n texts, n at least 3.

        Two texts of three see their own image, in either place, and one other image; the rest see
        two others. Others are drawn with the probability of the softmax of the images'
        similarities, without replacement. The host waits for them once.

        Args:
            images: [n, 3, image_size, image_size], normalised, the texts' own.
            text_ids, text_mask: as in `AlbefClassifier.logits`.
            seed: of the sampling; None takes one from torch's generator.

        Raises:
            TypeError, ValueError: an argument is not as described.
        """
        texts = Texts.make(self.config, text_ids, text_mask, images.device)
        check_count(images, texts)
        if len(images) < 3:
            raise ValueError(f"images: expected 3 or more, to draw from; got {len(images)}")
        tokens = self.student.encode_image(images)
        sampled = self.sample(tokens, seed)
        rows = tuple(row_map(i, len(images), images.device) for i in sampled.images.unbind(1))
        first = self.student.encode_assigned(tokens, texts, rows, self.reference)
        logits = _wide(self.student.ta_head(first))
        return F.cross_entropy(logits, sampled.labels.to(images.device))

    @torch.no_grad()
    def sample(self, tokens: Tensor, seed: int | None = None) -> Assignment:
        """Images for the texts whose own images' tokens [n, L, vision_width] these are."""
        count = len(tokens)
        features = F.normalize(_wide(self.vision_proj(tokens[:, 0])), dim=-1)
        logits = (features @ features.T / self.config.temperature).cpu()
        generator = torch.Generator().manual_seed(
            int(torch.randint(2**62, ())) if seed is None else seed
        )
        # The two largest of logits + Gumbel noise are two samples of a softmax without replacement.
        noise = -torch.empty(count, count).exponential_(generator=generator).log()
        others = (logits + noise).fill_diagonal_(-torch.inf).topk(2).indices
        labels = torch.randint(3, (count,), generator=generator)
        own = torch.arange(count)
        chosen = [
            torch.where(labels == 0, own, others[:, 0]),
            torch.where(labels == 1, own, torch.where(labels == 0, others[:, 0], others[:, 1])),
        ]
        return Assignment(torch.stack(chosen, 1), labels)


def entailment(name: str, **overrides: Any) -> AlbefClassifier:
    """A freshly initialised model of visual entailment, of a named size of `albef.CONFIGS`."""
    return AlbefClassifier(ClassifierConfig.named(name, **overrides))


def nlvr2(name: str, **overrides: Any) -> AlbefClassifier:
    """A freshly initialised model of NLVR2, of a named size of `albef.CONFIGS`."""
    given = dict(classes=2, images=2) | overrides
    return AlbefClassifier(ClassifierConfig.named(name, **given))


def text_assignment(name: str, **overrides: Any) -> AlbefTextAssignment:
    """A freshly initialised model of text assignment, of a named size of `albef.CONFIGS`."""
    return AlbefTextAssignment(FinetuningConfig.named(name, **overrides))


def load(path: str | Path) -> AlbefClassifier:
    """The classifier that ``base.save(model, path)`` wrote, on the CPU, in evaluation mode."""
    return base.load(path, AlbefClassifier.kind)
