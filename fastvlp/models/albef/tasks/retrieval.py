"""ALBEF fine-tuned for retrieval: contrast with ids as positives, and matching.

Li et al., arXiv 2107.07651, section 5. As in pretraining without the masked texts, but that all
pairs of one image, in the batch and in the queue, are positives of one another (`queue_ids`), and
that none of them is drawn as a hard negative. `fastvlp.models.albef.tasks.rerank` evaluates.

The temperature is clamped as in pretraining; the authors' retrieval code does not clamp it, which
differs outside 0.001 to 0.5 only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvlp.models import base
from fastvlp.models.albef import reference as albef_reference
from fastvlp.models.albef.config import CONFIGS, AlbefConfig
from fastvlp.models.albef.model import MAX_TEMPERATURE, MIN_TEMPERATURE, Albef
from fastvlp.models.albef.pretraining_batch import Matches, Teacher
from fastvlp.models.albef.tasks.common import Texts, check_alpha, check_count
from fastvlp.ops import momentum_contrastive
from fastvlp.ops.packing import PairLayout


class RetrievalLosses(NamedTuple):
    """Of one step; `total` is the sum of the others."""

    total: Tensor
    itc: Tensor
    itm: Tensor


class AlbefRetrieval(Albef):
    """`Albef` with the loss of retrieval fine-tuning; parameters and their names are the same."""

    kind = "albef-retrieval"
    config_type = AlbefConfig

    def __init__(self, config: AlbefConfig) -> None:
        super().__init__(config)
        if config.pretraining and not config.queue_ids:
            raise ValueError("queue_ids: expected True, retrieval is trained with pairs' ids")
        # Nothing here trains the vocabulary head but for its word embeddings.
        head = self.student.text_encoder.predictions
        for name, parameter in head.named_parameters():
            parameter.requires_grad_(name == "decoder.weight")

    def forward(self, *args: Any, **kwargs: Any) -> RetrievalLosses:
        """`retrieval_loss`, so that a wrapper such as DistributedDataParallel can call it."""
        return self.retrieval_loss(*args, **kwargs)

    def retrieval_loss(
        self,
        images: Tensor,
        text_ids: Tensor,
        text_mask: Tensor | list[int],
        ids: Tensor,
        alpha: Tensor | float = 0.4,
        *,
        update: bool = True,
        momentum_updated: bool = False,
        seed: Tensor | int | None = None,
    ) -> RetrievalLosses:
        """The losses of B pairs; with `update` also moves the momentum encoder and fills the
        queues.

        Args:
            images: [B, 3, image_size, image_size], normalised.
            text_ids: int [B, length], padded.
            text_mask: bool [B, length], true at tokens, or the B lengths. Best on the host.
            ids: int64 [B], the image's number; pairs of equal id match one another.
            alpha, update, momentum_updated, seed: as in `Albef.pretraining_loss`.

        Raises:
            TypeError, ValueError: an argument is not as described; momentum encoder and queues are
                as before.
            RuntimeError: the model was made without pretraining.
        """
        if self.momentum is None:
            raise RuntimeError("retrieval_loss: expected a model made with pretraining=True")
        self.student.visual_encoder.check(images)
        texts = Texts.make(self.config, text_ids, text_mask, images.device)
        check_count(images, texts)
        check_alpha(alpha)
        if ids.dtype != torch.int64 or ids.shape != (len(images),):
            raise ValueError(
                f"ids: expected int64 [{len(images)}], got {ids.dtype} {tuple(ids.shape)}"
            )
        with torch.no_grad():
            self.temp.clamp_(MIN_TEMPERATURE, MAX_TEMPERATURE)
            if update and not momentum_updated:
                self.momentum.update()
        step = _plain_step if self.reference else _step
        itc, itm, teacher = step(self, _Batch(images, texts, alpha, ids), seed)
        if update:
            self.queue.enqueue(teacher.image, teacher.text, ids)
        return RetrievalLosses(itc + itm, itc, itm)


class _Batch(NamedTuple):
    images: Tensor
    texts: Texts
    alpha: Tensor | float
    pair_ids: Tensor


def _step(model: AlbefRetrieval, batch: _Batch, seed) -> tuple[Tensor, Tensor, Teacher]:
    student, (ids, _, layout) = model.student, batch.texts
    with torch.no_grad():
        encoder, dtype = model.teacher, model.queue.image_queue.dtype
        image = encoder.image_features(encoder.encode_image(batch.images)).to(dtype)
        text = encoder.text_features(layout.first(encoder.encode_text(ids, layout))).to(dtype)
    images = student.encode_image(batch.images)
    texts = student.encode_text(ids, layout)
    contrast = momentum_contrastive(
        student.image_features(images),
        student.text_features(layout.first(texts)),
        image,
        text,
        temperature=model.temp,
        alpha=batch.alpha,
        ids=batch.pair_ids,
        seed=seed,
        **model.queue.keys(),
    )
    matches = Matches.make(contrast.negative_texts, contrast.negative_images)
    pairs = PairLayout.make(layout, matches.text, matches.image, len(images))
    first = student.fuse(pairs.expand(texts), pairs, images, pairs.starts)
    itm = base.mean_cross_entropy(model.itm_head(first).float(), matches.labels)
    return contrast.loss, itm, Teacher(image, text, None)


def _plain_step(model: AlbefRetrieval, batch: _Batch, seed) -> tuple[Tensor, Tensor, Teacher]:
    """`_step` of padded texts, an image repeated for each of its pairs, whole similarities."""
    student, (ids, mask, _) = model.student, batch.texts
    with torch.no_grad():
        encoder, dtype = model.teacher, model.queue.image_queue.dtype
        image = encoder.image_features(encoder.encode_image(batch.images)).to(dtype)
        text = encoder.text_features(encoder.encode_padded(ids, mask)[:, 0]).to(dtype)
    teacher = Teacher(image, text, None)
    images = student.encode_image(batch.images)
    texts = student.encode_padded(ids, mask)
    contrast = albef_reference.contrast(
        model, batch, student.image_features(images), student.text_features(texts[:, 0]),
        teacher, seed,
    )  # fmt: skip
    matches = Matches.make(contrast.negative_texts, contrast.negative_images)
    fused = student.fuse_padded(texts[matches.text], mask[matches.text], images[matches.image])
    itm = base.mean_cross_entropy(model.itm_head(fused[:, 0]).float(), matches.labels)
    return contrast.loss, itm, teacher


def create(name: str, **overrides: Any) -> AlbefRetrieval:
    """A freshly initialised model of a named size.

    Args:
        name: a key of ``albef.CONFIGS``.
        overrides: fields of ``AlbefConfig``. `pretraining=False` leaves out momentum encoder and
            queues, for evaluation.
    """
    if name not in CONFIGS:
        raise base.unknown_name("name", name, list(CONFIGS))
    fields = {**vars(CONFIGS[name]), "queue_ids": True, **overrides}
    return AlbefRetrieval(AlbefConfig(**fields))


def load(path: str | Path) -> AlbefRetrieval:
    """The model that ``base.save(model, path)`` wrote, on the CPU, in evaluation mode."""
    return base.load(path, AlbefRetrieval.kind)
