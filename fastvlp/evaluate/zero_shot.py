"""Zero-shot classification: images are given the class whose prompts they are nearest to.

Radford et al. 2021, section 3.1: each class is described by several prompts; its weight vector is
the mean of their normalised features, normalised again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from zlib import crc32

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastvlp.distributed import reporting, spans_ranks, validate_across_ranks
from fastvlp.evaluate.features import products

# A short ensemble in the manner of the paper's section 3.1.4. `read_templates` takes any other.
TEMPLATES = (
    "a photo of a {}.",
    "a blurry photo of a {}.",
    "a cropped photo of a {}.",
    "a photo of a small {}.",
    "a photo of a large {}.",
    "a drawing of a {}.",
    "many {} in a photo.",
)


def read_templates(path: str | Path) -> list[str]:
    """Templates from a text file, one a line, with {} where the name of the class goes.

    Raises:
        ValueError: a line has no {}, or there is none at all.
    """
    lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    templates = [line for line in lines if line]
    for line in templates:
        if line.count("{}") != 1:
            raise ValueError(f"{path}: expected one {{}} in each template, got {line!r}")
    if not templates:
        raise ValueError(f"{path}: expected one template a line, got none")
    return templates


def prompts(names: Sequence[str], templates: Sequence[str] = TEMPLATES) -> list[list[str]]:
    """For each class, each template with its name in place of {}.

    Raises:
        TypeError: `names` or `templates` is one string, which would be taken letter by letter.

    Examples:
        >>> from fastvlp.evaluate.zero_shot import prompts
        >>> prompts(["dog", "bus"], ["a photo of a {}."])
        [['a photo of a dog.'], ['a photo of a bus.']]
    """
    for argument, value in (("names", names), ("templates", templates)):
        if isinstance(value, str):
            raise TypeError(
                f"{argument}: expected a sequence of strings, got one, {value!r}; write [{value!r}]"
            )
    return [[template.replace("{}", name) for template in templates] for name in names]


@torch.inference_mode()
def classifier(
    prompts_of_class: Sequence[Sequence[str]],
    tokenizer: Callable[[list[str]], Tensor],
    encode_texts: Callable[[Tensor], Tensor],
    *,
    batch_size: int = 256,
) -> Tensor:
    """Weights [classes, dim], rows of norm 1, from each class's prompts, at least one each.

    Texts are encoded `batch_size` at a time, whatever the sizes of the classes.
    """
    for each in (prompts_of_class, *prompts_of_class):
        if isinstance(each, str):
            raise TypeError(
                f"prompts_of_class: expected a sequence of prompts for each class, got {each!r}; "
                "see `prompts`"
            )
    sizes = [len(each) for each in prompts_of_class]
    if not sizes or min(sizes) == 0:
        raise ValueError("prompts_of_class: expected classes, and at least one prompt for each")
    texts = [text for each in prompts_of_class for text in each]
    parts = [
        F.normalize(encode_texts(tokenizer(texts[at : at + batch_size])).float(), dim=-1)
        for at in range(0, len(texts), batch_size)
    ]
    means = [each.mean(0) for each in torch.cat(parts).split(sizes)]
    return F.normalize(torch.stack(means), dim=-1)


@torch.inference_mode()
def accuracy(
    image_features: Tensor,
    weights: Tensor,
    labels: Tensor,
    *,
    ks: Sequence[int] = (1, 5),
    chunk: int = 4096,
    group: dist.ProcessGroup | None = None,
) -> dict[str, float]:
    """Share of images whose class is among the k of the highest dot product.

    A wrong class with the same dot product as the right one counts as higher.

    Args:
        image_features: [n, dim] of this rank's images.
        weights: [classes, dim], see `classifier`.
        labels: int64 [n], rows of `weights`.
        chunk: images whose products are held at once.
        group: ranks that have other images; all get the result over everybody's.

    Returns:
        "top-k" and "chance top-k" for each k, and "mean per class", the mean over the classes that
        occur of the share of their images whose class came first.

    Raises:
        ValueError: there is no image, or labels are not as described.
        RuntimeError: with a group, on every rank, when one rank fails or its classes or ks differ.
    """
    with reporting(group, "accuracy"):
        totals = _counts(image_features, weights, labels, ks, chunk)
    if spans_ranks(group):
        facts = {"classes": len(weights), "ks": crc32(repr(list(ks)).encode())}
        validate_across_ranks(group, "accuracy", facts=facts)
        for total in totals:
            dist.all_reduce(total, group=group)
    hits, seen, first = totals
    images = seen.sum().item()
    if not images:
        raise ValueError("image_features: expected at least one image")
    result = {f"top-{k}": hit / images for k, hit in zip(ks, hits.tolist(), strict=True)}
    result |= {f"chance top-{k}": min(1.0, k / len(weights)) for k in ks}
    occur = seen > 0
    result["mean per class"] = (first[occur] / seen[occur]).mean().item()
    return result


def _counts(image_features, weights, labels, ks, chunk) -> tuple[Tensor, Tensor, Tensor]:
    """Hits for each k, then images and first places of each class: all that ranks exchange."""
    if labels.shape != image_features.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels: expected int64 [{len(image_features)}], got {labels.dtype} "
            f"{list(labels.shape)}"
        )
    classes = len(weights)
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"labels: expected 0 to {classes - 1}, got others")
    hits = torch.zeros(len(ks), dtype=torch.float64, device=weights.device)
    seen, first = (torch.zeros(classes, dtype=torch.float64, device=weights.device) for _ in "ab")
    for features, label in zip(image_features.split(chunk), labels.split(chunk), strict=True):
        scores = products(features.float(), weights)
        right = scores.gather(1, label[:, None])
        # What is not behind, so that a NaN never helps; the right class itself is one of them.
        rank = classes - (scores < right).sum(1)
        hits += torch.stack([(rank <= k).double().sum() for k in ks])
        seen += torch.bincount(label, minlength=classes)
        first += torch.bincount(label[rank == 1], minlength=classes)
    return hits, seen, first
