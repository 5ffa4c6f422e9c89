"""ALBEF: an image and a text transformer aligned by contrast, then fused by cross-attention.

Li et al., "Align before Fuse: Vision and Language Representation Learning with Momentum
Distillation", arXiv 2107.07651. Parameter names below `student.` and `momentum.module.` are those
of the authors' checkpoints, see `fastvlp.models.checkpoints.albef`.

One pretraining step has three objectives of equal weight: contrast of images and texts against
momentum keys and a queue (ITC), matching of pairs with hard negatives (ITM), and masked language
modelling with the image at hand (MLM), ITC and MLM with the momentum encoder as a teacher. Where
the authors run four passes through the fusion layers on padded pairs, here one packed pass takes
the positives, both kinds of hard negatives and the masked texts, grouped by image, so that an
image's keys and values are projected once in each layer; the last layer computes only what the
objectives read, each pair's first token and the masked ones, and only the latter meet the
vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastvlp.models import base
from fastvlp.models.albef import reference as albef_reference
from fastvlp.models.albef.config import CONFIGS as CONFIGS
from fastvlp.models.albef.config import AlbefConfig
from fastvlp.models.albef.encoder import Towers
from fastvlp.models.albef.momentum import WithMomentum
from fastvlp.models.albef.pretraining_batch import Batch, Matches, Teacher, prepare
from fastvlp.models.base import save as save
from fastvlp.nn.feature_queue import FeatureQueue
from fastvlp.ops import momentum_contrastive, soft_cross_entropy
from fastvlp.ops.packing import PairLayout

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.001, 0.5


class Losses(NamedTuple):
    """Of one pretraining step; `total` is the sum of the others."""

    total: Tensor
    itc: Tensor
    itm: Tensor
    mlm: Tensor


class MomentumFeatures(NamedTuple):
    """What a pass adds to the queues."""

    image: Tensor  # [B, embed_dim], unit rows
    text: Tensor
    ids: Tensor | None  # int64 [B], with `queue_ids`


class Step(NamedTuple):
    """What one pretraining step computes."""

    losses: Losses
    features: MomentumFeatures


class Albef(WithMomentum):
    """The model, its momentum encoder and its queues.

    Attributes:
        student: the encoders, see `fastvlp.models.albef.encoder.Towers`.
        itm_head: of a pair's first fused token; column 1 says that text and image match.
        temp: the contrastive temperature, by which similarities are divided.
        momentum: the momentum encoder, an `EmaModel` of `student`; None without pretraining.
        queue: a `FeatureQueue` of the momentum encoder's features; None without pretraining. Give
            it a process group (`queue.group`) to gather the features of all ranks.
    """

    kind = "albef"
    config_type = AlbefConfig

    def __init__(self, config: AlbefConfig) -> None:
        super().__init__(config, Towers(config), with_momentum=False)
        self.itm_head = nn.Linear(config.text_width, 2)
        self.temp = nn.Parameter(torch.tensor(config.temperature))
        self.queue = None
        if config.pretraining:
            # After the heads: the order of parameters is that of optimiser states.
            self._add_momentum()
            self.queue = FeatureQueue(
                config.queue_size, config.embed_dim, fill="random", with_ids=config.queue_ids
            )

    def forward(self, *args: Any, return_features: bool = False, **kwargs: Any) -> Losses | Step:
        """`pretraining_loss`, or with `return_features` `pretraining_step`, so that a wrapper such
        as DistributedDataParallel can call either."""
        if return_features:
            return self.pretraining_step(*args, **kwargs)
        return self.pretraining_loss(*args, **kwargs)

    def pretraining_loss(
        self,
        images: Tensor,
        text_ids: Tensor,
        text_mask: Tensor | list[int],
        masked_ids: Tensor,
        labels: Tensor,
        alpha: Tensor | float = 0.4,
        *,
        ids: Tensor | None = None,
        update: bool = True,
        momentum_updated: bool = False,
        check_finite: bool = False,
        seed: Tensor | int | None = None,
    ) -> Losses:
        """The losses of B pairs; with `update` also moves the momentum encoder and fills the
        queues.

        The temperature is clamped, the momentum encoder moves towards the weights before it
        teaches, and its features enter the queues after they were contrasted.

        Args:
            images: [B, 3, image_size, image_size], normalised.
            text_ids: int [B, length], padded.
            text_mask: bool [B, length], true at tokens, or the B lengths. Best on the host.
            masked_ids: int [B, length], the same texts with tokens masked.
            labels: int [B, length], the masked tokens, -100 elsewhere. Best on the host.
            alpha: weight of the teacher, 0 to 1.
            ids: int64 [B]; pairs of equal id match one another. With `queue_ids` only.
            update: move the momentum encoder and fill the queues.
            momentum_updated: the optimiser has moved the momentum encoder already
                (`AdamWEma(ema=...)`, which does it in one pass with the weights).
            check_finite: refuse images, weights and losses that are NaN or infinite; it waits for
                the device.
            seed: of the hard negatives; None takes one from torch's generator.

        On a GPU the host waits for the hard negatives, once, beside `text_mask` and `labels` where
        those are not on the host.

        Raises:
            TypeError, ValueError: an argument is not as described.
            FloatingPointError: with `check_finite`.
            RuntimeError: the model was made without pretraining.

        After an error the queues are as they were. The momentum encoder is too, unless the losses
        were not finite, or an error came while they were computed: then it has moved, and a
        repeated call says so by `momentum_updated`.
        """
        batch = self._prepared(
            images, text_ids, text_mask, masked_ids, labels, alpha, ids, check_finite
        )
        if update and not momentum_updated:
            self.momentum.update(check_finite=check_finite)
        losses, features = self._computed(batch, seed, check_finite)
        if update:
            self.enqueue([features])
        return losses

    def pretraining_step(
        self,
        images: Tensor,
        text_ids: Tensor,
        text_mask: Tensor | list[int],
        masked_ids: Tensor,
        labels: Tensor,
        alpha: Tensor | float = 0.4,
        *,
        ids: Tensor | None = None,
        check_finite: bool = False,
        seed: Tensor | int | None = None,
    ) -> Step:
        """The losses of B pairs and the features for the queues, which are left as they are.

        For trainers that know only after the backward pass whether a step is good: then its
        features go to `enqueue`, else nowhere. The momentum encoder teaches as it is.

        Arguments and errors are those of `pretraining_loss`.
        """
        batch = self._prepared(
            images, text_ids, text_mask, masked_ids, labels, alpha, ids, check_finite
        )
        return self._computed(batch, seed, check_finite)

    def enqueue(self, features: Sequence[MomentumFeatures]) -> None:
        """Fills the queues with the features of one step, of one or of several passes, in order.

        Over ranks every one calls it, however many passes each made.

        Raises:
            RuntimeError: the model was made without pretraining.
        """
        if self.queue is None:
            raise RuntimeError("enqueue: expected a model made with pretraining=True")
        image, text, ids = zip(*features, strict=True)
        self.queue.enqueue(
            torch.cat(image), torch.cat(text), None if ids[0] is None else torch.cat(ids)
        )

    def _prepared(
        self, images, text_ids, text_mask, masked_ids, labels, alpha, ids, check_finite
    ) -> Batch:
        if self.momentum is None:
            raise RuntimeError("pretraining_loss: expected a model made with pretraining=True")
        self.student.visual_encoder.check(images)
        batch = prepare(
            self.config, images, text_ids, text_mask, masked_ids, labels, alpha, ids
        )  # fmt: skip
        if check_finite and not images.isfinite().all():
            raise FloatingPointError("images: expected finite values; nothing was written")
        with torch.no_grad():
            self.temp.clamp_(MIN_TEMPERATURE, MAX_TEMPERATURE)
        return batch

    def _computed(self, batch: Batch, seed, check_finite: bool) -> Step:
        losses, teacher = (albef_reference.step if self.reference else _step)(self, batch, seed)
        losses = Losses(sum(losses), *losses)
        if check_finite and not losses.total.isfinite():
            raise FloatingPointError(
                f"losses: expected finite values, got {losses}; the queues are as they were"
            )
        return Step(losses, MomentumFeatures(teacher.image, teacher.text, batch.pair_ids))


def _step(model: Albef, batch: Batch, seed) -> tuple[tuple[Tensor, ...], Teacher]:
    """ITC, ITM and MLM by the kernels, and the teacher's features."""
    student, both, count = model.student, batch.both, len(batch)
    # Before the student, whose activations wait for the backward pass.
    teacher = _teach(model, batch)
    images = student.encode_image(batch.images)
    texts = student.encode_text(batch.ids, both)
    contrast = momentum_contrastive(
        student.image_features(images),
        student.text_features(both.first(texts)[:count]),
        teacher.image,
        teacher.text,
        temperature=model.temp,
        alpha=batch.alpha,
        ids=batch.pair_ids,
        seed=seed,
        **model.queue.keys(),
    )
    matches = Matches.make(contrast.negative_texts, contrast.negative_images)
    pairs, rows = matches.layout(batch)
    fused = student.fuse(pairs.expand(texts), pairs, images, rows)
    first, words = fused.split([len(matches.text), len(batch.labelled)])
    itm = base.mean_cross_entropy(model.itm_head(first).float(), matches.labels)
    predictions = student.text_encoder.predictions
    teacher_head = model.teacher.text_encoder.predictions
    mlm = soft_cross_entropy(
        predictions(words),
        predictions.decoder.weight,
        predictions.bias,
        batch.packed_labels,
        teacher_hidden=teacher.words,
        teacher_weight=teacher_head.decoder.weight,
        teacher_bias=teacher_head.bias,
        alpha=batch.alpha,
    )
    return (contrast.loss, itm, mlm), teacher


@torch.no_grad()
def _teach(model: Albef, batch: Batch) -> Teacher:
    teacher, both, count = model.teacher, batch.both, len(batch)
    images = teacher.encode_image(batch.images)
    texts = teacher.encode_text(batch.ids, both)
    features = teacher.text_features(both.first(texts)[:count])
    # The masked texts come last in `both`, each has one image, and they lie in the images' order.
    own = torch.arange(count)
    pairs = PairLayout.make(batch.masked, own, own, count)
    fused = teacher.fuse(texts[batch.masked.total :], pairs, images, batch.labelled)
    hidden = teacher.text_encoder.predictions(fused)
    # The copy's features are of its precision; the queue's and the student's are not.
    dtype = model.queue.image_queue.dtype
    return Teacher(teacher.image_features(images).to(dtype), features.to(dtype), hidden)


def create(name: str, **overrides: Any) -> Albef:
    """A freshly initialised model of a named size.

    Args:
        name: a key of ``CONFIGS``.
        overrides: fields of ``AlbefConfig`` to change, such as ``queue_size=4096``.

    Raises:
        ValueError: no such size, or the sizes do not fit together.
        TypeError: no such field.
    """
    if name not in CONFIGS:
        raise base.unknown_name("name", name, list(CONFIGS))
    return Albef(dataclasses.replace(CONFIGS[name], **overrides))


def load(path: str | Path) -> Albef:
    """The model that ``save(model, path)`` wrote, on the CPU, in evaluation mode.

    Raises:
        FileNotFoundError: one of the two files is not there.
    """
    return base.load(path, "albef")
