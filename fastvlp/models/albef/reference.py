"""The plain form of ALBEF's pretraining step: what the kernels' form is compared with.

Padded texts, one pass through the fusion layers for each objective, an image repeated for each of
its pairs, whole similarity matrices, and logits of the vocabulary at every position.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvlp.models.albef.pretraining_batch import IGNORED, Batch, Matches, Teacher
from fastvlp.models.base import mean_cross_entropy
from fastvlp.ops.momentum_contrastive import momentum_contrastive_reference


def step(model: Any, batch: Batch, seed: int | Tensor) -> tuple[tuple[Tensor, ...], Teacher]:
    """ITC, ITM and MLM of a checked batch, and the teacher's features."""
    student, count = model.student, len(batch)
    ids, masked_ids = batch.ids[:count], batch.ids[count:]
    images = student.encode_image(batch.images)
    texts = student.encode_padded(ids, batch.mask)
    image_features = student.image_features(images)
    text_features = student.text_features(texts[:, 0])
    teacher = _teach(model, batch)
    contrasted = contrast(model, batch, image_features, text_features, teacher, seed)
    matches = Matches.make(contrasted.negative_texts, contrasted.negative_images)
    itm = _matching(model, batch, texts, images, matches)
    hidden = student.fuse_padded(student.encode_padded(masked_ids, batch.mask), batch.mask, images)
    logits = student.text_encoder.predictions.logits(hidden)
    mlm = _language_modelling(logits, teacher.words, batch)
    return (contrasted.loss, itm, mlm), teacher


@torch.no_grad()
def _teach(model, batch: Batch) -> Teacher:
    teacher, count = model.teacher, len(batch)
    images = teacher.encode_image(batch.images)
    first = teacher.encode_padded(batch.ids[:count], batch.mask)[:, 0]
    masked = teacher.encode_padded(batch.ids[count:], batch.mask)
    hidden = teacher.fuse_padded(masked, batch.mask, images)
    logits = teacher.text_encoder.predictions.logits(hidden)
    dtype = model.queue.image_queue.dtype
    return Teacher(
        teacher.image_features(images).to(dtype), teacher.text_features(first).to(dtype), logits
    )


def contrast(model, batch, image_features, text_features, teacher, seed):
    keys, device = model.queue.keys(), image_features.device
    if seed is None or not isinstance(seed, Tensor):
        random = torch.randint(2**62, (), dtype=torch.int64, device=device)
        seed = random if seed is None else torch.full_like(random, seed)
    return momentum_contrastive_reference(
        image_features, text_features, teacher.image, teacher.text, keys["image_queue"],
        keys["text_queue"], model.temp, torch.as_tensor(batch.alpha, device=device),
        batch.pair_ids, keys["queue_ids"], keys["queue_length"], seed,
    )  # fmt: skip


def _matching(model, batch: Batch, texts: Tensor, images: Tensor, matches: Matches) -> Tensor:
    """The positives in one pass, the negatives in another."""
    count = len(batch)
    first = []
    for part in (slice(0, count), slice(count, None)):
        text, image = matches.text[part], matches.image[part]
        if len(text) or not first:
            fused = model.student.fuse_padded(texts[text], batch.mask[text], images[image])
            first.append(fused[:, 0])
    return mean_cross_entropy(model.itm_head(torch.cat(first)).float(), matches.labels)


def _language_modelling(logits: Tensor, teacher_logits: Tensor, batch: Batch) -> Tensor:
    labelled = batch.labels != IGNORED
    count = labelled.sum().clamp(min=1)
    hard = F.cross_entropy(
        logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    soft = -(logits.log_softmax(-1) * teacher_logits.softmax(-1)).sum(-1)
    return ((1 - batch.alpha) * hard + batch.alpha * soft[labelled].sum()) / count
