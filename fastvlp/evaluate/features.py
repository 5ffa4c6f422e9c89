"""Features of a whole data set, encoded a batch at a time, on one rank or divided among several."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastvlp.distributed import Gather, reporting, spans_ranks, validate_across_ranks


@dataclass(frozen=True)
class Features:
    """Of all pairs, in the data's order and on every rank: rows of norm 1, float32.

    Attributes:
        images: [pairs, dim].
        texts: [pairs, dim], or None.
        ids: int64 [pairs], equal for pairs of one image.
        index: int64 [pairs], rising, the pairs' places in the data; those whose image could not be
            decoded are missing.
    """

    images: Tensor
    texts: Tensor | None
    ids: Tensor
    index: Tensor

    def unique_images(self) -> tuple[Tensor, Tensor]:
        """Features of each image once, and int64 [pairs], the image of each caption."""
        _, owner = self.ids.unique(return_inverse=True)
        first = torch.full((int(owner.max()) + 1,), len(owner), device=owner.device)
        place = torch.arange(len(owner), device=owner.device)
        first = first.scatter_reduce(0, owner, place, "amin")
        return self.images[first], owner


@torch.inference_mode()
def encode(
    batches: Iterable[Any],
    encode_images: Callable[[Tensor], Tensor],
    encode_texts: Callable[[Any], Tensor] | None = None,
    *,
    device: torch.device | str = "cpu",
    group: dist.ProcessGroup | None = None,
) -> Features:
    """Features of this rank's batches and, with a group, of everybody's.

    Memory: the activations of one batch, and the features of the whole data set. Every rank must
    have equally many batches where the model is sharded; they may be empty.

    Args:
        batches: with `images`, `tokens`, `ids` and `index`, the pair's place in the data.
        encode_images, encode_texts: [n, dim], normalised or not.
        device: where the model is.

    Raises:
        ValueError: there is no pair.
        RuntimeError: with a group, on every rank, when encoding fails on one.
    """
    parts: dict[str, list[Tensor]] = {"images": [], "texts": [], "ids": [], "index": []}
    with reporting(group, "encode"):
        for batch in batches:
            parts["images"].append(_unit(encode_images(batch.images.to(device))))
            if encode_texts is not None:
                parts["texts"].append(_unit(encode_texts(batch.tokens)))
            parts["ids"].append(batch.ids)
            parts["index"].append(batch.index)
        whole = {name: torch.cat(tensors).to(device) for name, tensors in parts.items() if tensors}
        if spans_ranks(group) and not whole:
            raise ValueError("batches: expected one, though it may be empty, on each rank")
    if spans_ranks(group):
        whole = _gathered(whole, group)
    if not whole or not len(whole["index"]):
        raise ValueError("batches: expected at least one pair to encode")
    order = whole["index"].argsort()
    whole = {name: tensor[order] for name, tensor in whole.items()}
    return Features(whole["images"], whole.get("texts"), whole["ids"], whole["index"])


def products(queries: Tensor, keys: Tensor) -> Tensor:
    """[queries, keys], in the features' own precision under autocast too.

    In half precision many products would be equal, and what ranks by them counts equals as wrong.
    """
    with torch.autocast(queries.device.type, enabled=False):
        return queries @ keys.T


def _gathered(whole: dict[str, Tensor], group: dist.ProcessGroup) -> dict[str, Tensor]:
    facts = {"width": whole["images"].shape[1], "encode_texts": "texts" in whole}
    shards = validate_across_ranks(group, "encode", rows=len(whole["index"]), facts=facts)
    flying = {name: Gather(tensor, shards) for name, tensor in whole.items()}
    return {name: each.rows(slice(None)) for name, each in flying.items()}


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.float(), dim=-1)
