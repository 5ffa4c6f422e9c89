"""CLIP's task: one contrastive loss over the batch of all ranks, and a clamped temperature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlp.data.openmoji.loader import OpenMojiLoader
from fastvlp.evaluate import zero_shot
from fastvlp.evaluate.features import Features, encode
from fastvlp.evaluate.retrieval import retrieval
from fastvlp.grad_cache import GradCache
from fastvlp.losses import ClipLoss
from fastvlp.models import base, clip
from fastvlp.ops import contrastive
from fastvlp.train.parallel import Ranks
from fastvlp.train.tasks.base import Task


class ClipTask(Task):
    """Trains a `Clip` and evaluates it by retrieval and zero-shot classification.

    Args:
        model: the model.
        tokenizer: captions to ids.
        ranks: the processes of the run.
        held_out: loaders of held-out pairs by name, not shuffled.
        chunk_size: pairs that go through the model at a time, with the exact gradients of the
            whole batch by `GradCache`.
        groups: prompts of each class of the zero-shot task, by the name of the class, for those of
            `held_out` that are `OpenMojiLoader`; see `openmoji_groups`.
    """

    forward_methods = ("encode_image", "encode_text")

    def __init__(
        self,
        model: clip.Clip,
        tokenizer: Callable[[list[str]], Tensor],
        ranks: Ranks,
        *,
        held_out: dict[str, object] | None = None,
        chunk_size: int | None = None,
        groups: dict[str, list[str]] | None = None,
        reference: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.ranks = model, tokenizer, ranks
        self.held_out, self.chunk_size, self.groups = held_out or {}, chunk_size, groups or {}
        model.use_reference(reference)
        self.loss = plain_loss if reference else ClipLoss(group=ranks.group)
        if reference and ranks.group is not None:
            raise ValueError("reference: expected one rank; the plain loss knows no other ranks")

    def losses(self, model: nn.Module, batch) -> dict[str, Tensor]:
        return {"loss": self.loss(*model(batch.images, batch.tokens))}

    def backward(
        self, model: nn.Module, batch, scale: float = 1.0, sizes: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        # The loss over the group weighs the ranks itself.
        if self.chunk_size is None:
            return super().backward(model, batch, scale)
        step = GradCache(
            model, self.loss, self.chunk_size, backward=lambda loss: (loss * scale).backward()
        )
        return {"loss": step.step(batch.images, batch.tokens)}

    def uses_weight_decay(self, name: str, parameter: nn.Parameter) -> bool:
        return parameter.ndim > 1 and not name.endswith("positional_embedding")

    def blocks(self) -> list[nn.Module]:
        return [*self.model.visual.transformer.resblocks, *self.model.transformer.resblocks]

    def after_step(self) -> None:
        self.model.clamp_logit_scale_()

    def metrics(self) -> dict[str, float]:
        return {"logit_scale": self.model.logit_scale.exp().item()}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Recalls in both directions and the loss of each held-out set, and zero-shot accuracy over
        emoji groups."""
        scores = {}
        for name, loader in self.held_out.items():
            found = features(model, loader, self.ranks)
            images, of_text = found.unique_images()
            directions = retrieval(images, found.texts, of_text, group=self.ranks.group)
            for direction, result in directions.items():
                scores |= {f"{name}/{direction}/{k}": v for k, v in result.items() if k[0] == "R"}
            scores[f"{name}/loss"] = held_out_loss(
                found, model.logit_scale.exp().item(), loader.batch_size * self.ranks.world_size
            )
            if isinstance(loader, OpenMojiLoader) and set(loader.bases) <= set(self.groups):
                result = zero_shot_over_groups(
                    model, self.tokenizer, self.groups, loader.bases, found
                )
                scores |= {f"{name}/zero_shot/{k}": v for k, v in result.items() if k[0] == "t"}
        return scores

    def save_tokenizer(self, folder: Path) -> None:
        self.tokenizer.save(folder / "tokenizer.json")

    def save(self, model: nn.Module, folder: Path) -> None:
        """Writes model.safetensors, model.json and tokenizer.json."""
        base.save(model, folder / "model")
        self.save_tokenizer(folder)


def plain_loss(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """CLIP's loss as the paper's figure 3 has it, with the matrix of all dot products."""
    logits = (scale * images @ texts.T).float()
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def held_out_loss(found: Features, scale: float, batch_size: int) -> float:
    """CLIP's loss over the pairs in batches as large as those of training, in the data's order.

    The value depends on the number of pairs that are told apart: what is left over, in a smaller
    batch, counts only where there is no whole one.

    Args:
        found: with features of texts.
        scale: that products are multiplied by, exp of the logit scale.
        batch_size: pairs of a batch, over all ranks.
    """
    whole = max(1, len(found.images) // batch_size)
    parts = zip(found.images.split(batch_size), found.texts.split(batch_size), strict=True)
    losses = [contrastive(image, text, scale).item() for image, text in parts]
    return sum(losses[:whole]) / whole


def features(model: nn.Module, loader, ranks: Ranks) -> Features:
    """Features of all of the loader's pairs."""
    loader.load_state_dict({**loader.state_dict(), "epoch": 0, "place": 0})
    return encode(
        loader,
        model.encode_image,
        lambda tokens: model.encode_text(tokens.to(ranks.device)),
        device=ranks.device,
        group=ranks.group,
    )


def openmoji_groups(train: OpenMojiLoader) -> dict[str, list[str]]:
    """For each base emoji the captions of its variants in training: the prompts of its group."""
    groups: dict[str, list[str]] = {}
    for name, caption in sorted(zip(train.bases, train.captions, strict=True)):
        groups.setdefault(name, []).append(caption)
    return groups


def zero_shot_over_groups(
    model: nn.Module,
    tokenizer: Callable[[list[str]], Tensor],
    groups: dict[str, list[str]],
    bases: list[str],
    found: Features,
) -> dict[str, float]:
    """Accuracy of giving each image its base emoji, whose prompts are `groups`' captions.

    bases: of all pairs of the data, by their places in it.
    """
    device = found.images.device
    weights = zero_shot.classifier(
        list(groups.values()), tokenizer, lambda tokens: model.encode_text(tokens.to(device))
    )
    row = {name: i for i, name in enumerate(groups)}
    labels = torch.tensor([row[bases[place]] for place in found.index.tolist()], device=device)
    return zero_shot.accuracy(found.images, weights, labels)
