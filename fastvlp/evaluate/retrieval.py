"""Retrieval between images and texts by the dot product of their features, in both directions.

The protocol of COCO and Flickr30k (Karpathy and Fei-Fei 2015, section 4.1): an image may have
several captions, a text belongs to one image, and an image is as good as its best-ranked caption.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from zlib import crc32

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fastvlp.distributed import Gather, group_device, reporting, spans_ranks, validate_across_ranks
from fastvlp.evaluate.bootstrap import share_interval
from fastvlp.evaluate.features import products

DEFAULT_WORKSPACE_BYTES = 256 * 2**20


def retrieval(
    image_features: Tensor,
    text_features: Tensor,
    image_of_text: Tensor | None = None,
    *,
    ks: Sequence[int] = (1, 5, 10),
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    group: dist.ProcessGroup | None = None,
    confidence: float | None = None,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Recall at k and median rank of text→image and image→text retrieval.

    A pair's score is the dot product of its features, in float32 or, for float64 features, in
    float64, under autocast too; normalise the rows first for cosine similarity. Every score is
    computed; none is sampled. A wrong candidate with the same score as the right one is ranked
    before it, so that a model which says the same of everything scores nothing.

    Args:
        image_features: [images, dim] floating point.
        text_features: [texts, dim], same dtype and device.
        image_of_text: [texts] int64, the row of the image that each text describes; by default
            text i describes image i. An image without text only serves as a candidate.
        ks: the cut-offs.
        workspace_bytes: bound on the extra memory, but for one row of scores and what is linear in
            the number of features.
        group: ranks that all have the same features and divide the queries among them.
        confidence: of intervals of the recalls by bootstrap over the queries, such as 0.95; see
            `fastvlp.evaluate.bootstrap`. None for no intervals.
        seed: of the bootstrap.

    Returns:
        {"text_to_image": {...}, "image_to_text": {...}}, each with, for each k, "R@k" (share of
        queries with a right answer among the first k) and "chance_R@k" (its expectation under
        random order), and with "median_rank" (1 is best); with `confidence` also "R@k low" and
        "R@k high", the ends of the interval.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape or range, or is not finite.
        RuntimeError: with a group, on every rank, when one rank fails or differs from the others.

    Examples:
        >>> import torch
        >>> from fastvlp.evaluate.retrieval import retrieval
        >>> scores = retrieval(torch.eye(20), torch.eye(20).roll(1, 0))
        >>> scores["text_to_image"]["R@10"], scores["text_to_image"]["median_rank"]
        (0.0, 20.0)
    """
    with reporting(group, "retrieval"):
        _check_features(image_features, text_features)
        images, texts = len(image_features), len(text_features)
        owner = _check_owner(image_of_text, images, texts).to(image_features.device)
        _check_ks(ks)
        captions = torch.bincount(owner, minlength=images)
        described = captions.nonzero().squeeze(1)
        row = torch.arange(images, device=owner.device)
    if spans_ranks(group):
        facts = {"images": images, "texts": texts, "width": image_features.shape[1]}
        validate_across_ranks(
            group, "retrieval", facts=facts | _checksums(image_features.dtype, owner, ks)
        )
    to_image = (text_features, image_features, owner, row)
    to_text = (image_features[described], text_features, described, owner)
    image_ranks = _divided_ranks(*to_image, workspace_bytes, group)
    text_ranks = _divided_ranks(*to_text, workspace_bytes, group)
    sure = (confidence, seed)
    return {
        "text_to_image": _summary(image_ranks, torch.ones_like(owner), images, ks, sure),
        "image_to_text": _summary(text_ranks, captions[described], texts, ks, sure),
    }


def _checksums(dtype: torch.dtype, owner: Tensor, ks: Sequence[int]) -> dict[str, int]:
    """By which ranks compare options that are no single number."""
    parts = {
        "dtype": str(dtype).encode(),
        "image_of_text": owner.cpu().numpy().tobytes(),
        "ks": repr(list(ks)).encode(),
    }
    return {f"checksum of {name}": crc32(part) for name, part in parts.items()}


def _divided_ranks(queries, keys, query_label, key_label, workspace_bytes, group) -> Tensor:
    """`_ranks`, each rank of the group for an equal share of the queries."""
    if not spans_ranks(group):
        return _ranks(queries, keys, query_label, key_label, workspace_bytes)
    share = -(-len(queries) // group.size())
    own = slice(group.rank() * share, (group.rank() + 1) * share)
    with reporting(group, "retrieval"):
        found = _ranks(queries[own], keys, query_label[own], key_label, workspace_bytes)
        found = found.to(group_device(group))
    shards = validate_across_ranks(group, "retrieval", rows=len(found))
    return Gather(found, shards).rows(slice(None)).cpu()


def retrieval_from_scores(
    text_to_image: Tensor,
    image_to_text: Tensor,
    image_of_text: Tensor | None = None,
    *,
    ks: Sequence[int] = (1, 5, 10),
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    confidence: float | None = None,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """`retrieval` by scores that something else computed, such as a re-ranking model's.

    Args:
        text_to_image: [texts, images] floating point, higher is better.
        image_to_text: [images, texts], same device. It need not be the other's transpose: with
            re-ranking each direction scores its own candidates and gives one low value to the rest.
        image_of_text, ks, workspace_bytes, confidence, seed: as in `retrieval`.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape or range.
    """
    for name, scores in (("text_to_image", text_to_image), ("image_to_text", image_to_text)):
        _check_tensor(name, scores)
        if not scores.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {scores.dtype}")
    if text_to_image.ndim != 2:
        raise ValueError(f"text_to_image must be [texts, images], got {list(text_to_image.shape)}")
    texts, images = text_to_image.shape
    if image_to_text.shape != (images, texts) or not texts or not images:
        raise ValueError(
            f"image_to_text must be [images, texts], the transpose of text_to_image's "
            f"{[texts, images]} and not empty, got {list(image_to_text.shape)}"
        )
    owner = _check_owner(image_of_text, images, texts).to(text_to_image.device)
    _check_ks(ks)
    captions = torch.bincount(owner, minlength=images)
    described = captions.nonzero().squeeze(1)
    row = torch.arange(images, device=owner.device)

    image_ranks = _ranks_by_scores(text_to_image, owner, row, workspace_bytes)
    text_ranks = _ranks_by_scores(image_to_text, row, owner, workspace_bytes)
    sure = (confidence, seed)
    return {
        "text_to_image": _summary(image_ranks, torch.ones_like(owner), images, ks, sure),
        "image_to_text": _summary(
            text_ranks[described.cpu()], captions[described], texts, ks, sure
        ),
    }


def _ranks(
    queries: Tensor, keys: Tensor, query_label: Tensor, key_label: Tensor, workspace_bytes: int
) -> Tensor:
    """For each query, 1 + the number of wrong keys that score as high as its best right key.

    A key is right where its label is the query's; each query must have one.
    """
    if queries.dtype not in (torch.float32, torch.float64):
        queries, keys = queries.float(), keys.float()
    # Scores, a masked copy of them, and two masks are alive at once.
    row_bytes = len(keys) * (2 * queries.element_size() + 2)
    rows = max(1, workspace_bytes // row_bytes)
    ranks = []
    for chunk, label in zip(queries.split(rows), query_label.split(rows), strict=True):
        ranks.append(_ranks_of_scores(products(chunk, keys), label[:, None] == key_label))
    return torch.cat(ranks).cpu()


def _ranks_by_scores(
    scores: Tensor, row_label: Tensor, column_label: Tensor, workspace_bytes: int
) -> Tensor:
    """`_ranks` of rows whose scores are there; a row without a right column counts for nothing."""
    rows = max(1, workspace_bytes // (scores.shape[1] * (scores.element_size() + 2)))
    parts = zip(scores.split(rows), row_label.split(rows), strict=True)
    return torch.cat(
        [_ranks_of_scores(part, label[:, None] == column_label) for part, label in parts]
    ).cpu()


def _ranks_of_scores(scores: Tensor, right: Tensor) -> Tensor:
    """For each row, 1 + the number of wrong columns that score as high as its best right one."""
    best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
    # Counts what is not behind, so that a score that overflowed to NaN never helps.
    behind = (scores < best).logical_or_(right)
    return scores.shape[1] + 1 - behind.count_nonzero(dim=1)


def _summary(
    ranks: Tensor,
    right: Tensor,
    candidates: int,
    ks: Sequence[int],
    sure: tuple[float | None, int],
) -> dict[str, float]:
    """Recalls and median rank.

    right: [queries], how many of the candidates are right for each. sure: the confidence of
    intervals, or None, and their seed.
    """
    result = {f"R@{k}": (ranks <= k).double().mean().item() for k in ks}
    confidence, seed = sure
    if confidence is not None:
        for k in ks:
            low, high = share_interval(ranks <= k, confidence, seed=seed)
            result |= {f"R@{k} low": low, f"R@{k} high": high}
    result["median_rank"] = float(np.median(ranks.numpy()))
    sizes, queries = right.cpu().unique(return_counts=True)
    weights = (queries / queries.sum()).tolist()
    for k in ks:
        chances = [_chance(size, candidates, k) for size in sizes.tolist()]
        result[f"chance_R@{k}"] = math.fsum(w * c for w, c in zip(weights, chances, strict=True))
    return result


def _chance(right: int, candidates: int, k: int) -> float:
    """Probability that k draws without replacement hit one of the right candidates."""
    taken = min(k, candidates)
    return 1 - math.comb(candidates - right, taken) / math.comb(candidates, taken)


def _check_ks(ks: Sequence[int]) -> None:
    if not isinstance(ks, Sequence) or not ks or any(type(k) is not int or k < 1 for k in ks):
        raise ValueError(f"ks must be positive integers, at least one, got {ks!r}")


def _check_tensor(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def _check_features(image_features: Tensor, text_features: Tensor) -> None:
    for name, features in (("image_features", image_features), ("text_features", text_features)):
        _check_tensor(name, features)
        if not features.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {features.dtype}")
        if features.ndim != 2 or not len(features):
            raise ValueError(
                f"{name} must be [n, dim] with at least one row, got {list(features.shape)}"
            )
        if not features.isfinite().all():
            raise ValueError(
                f"{name} must be finite, got NaN or infinity; ranks of such scores mean nothing"
            )
    if image_features.dtype != text_features.dtype:
        raise TypeError(
            f"text_features must have the dtype of image_features, "
            f"{image_features.dtype}, got {text_features.dtype}"
        )
    if image_features.device != text_features.device:
        raise ValueError(
            f"text_features must be on the device of image_features, "
            f"{image_features.device}, got {text_features.device}"
        )
    if image_features.shape[1] != text_features.shape[1]:
        raise ValueError(
            f"text_features must be as wide as image_features, "
            f"{image_features.shape[1]}, got {text_features.shape[1]}"
        )


def _check_owner(image_of_text: Tensor | None, images: int, texts: int) -> Tensor:
    if image_of_text is None:
        if images != texts:
            raise ValueError(
                f"image_of_text must be given unless text i describes image i; got "
                f"{texts} texts and {images} images"
            )
        return torch.arange(images)
    _check_tensor("image_of_text", image_of_text)
    if image_of_text.dtype != torch.int64:
        raise TypeError(f"image_of_text must be int64, got {image_of_text.dtype}")
    if image_of_text.shape != (texts,):
        raise ValueError(
            f"image_of_text must be [{texts}], one entry for each text, "
            f"got {list(image_of_text.shape)}"
        )
    if image_of_text.min() < 0 or image_of_text.max() >= images:
        raise ValueError(
            f"image_of_text must lie in 0 .. {images - 1}, got values from "
            f"{image_of_text.min()} to {image_of_text.max()}"
        )
    return image_of_text
