"""Retrieval by ALBEF in two rounds: contrastive features choose candidates, fusion scores them.

Li et al., arXiv 2107.07651, section 5. For each image the k texts, and for each text the k images,
of the largest dot product of features are scored by the matching head's logit of "match"; all
others get -100. `fastvlp.evaluate.retrieval.retrieval_from_scores` turns the two matrices into
recalls, an image being as good as its best-ranked caption.

A pair's score is the same in both directions, so the candidates of both are united and each pair is
fused once. Pairs are grouped by image: the keys and values of an image are projected once in each
layer and serve all of its pairs, however many packed calls those take.

Cost: beside the features, P pairs of t tokens take 2 P t D (6 D + 2 I) + 4 P t L D FLOP a fusion
layer and the images 4 n L E D, where the padded form pays the latter for each pair. Memory beside
the inputs and the two matrices: `workspace_bytes`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from fastvlp.distributed import group_device, reporting, spans_ranks, validate_across_ranks
from fastvlp.models.albef.model import Albef
from fastvlp.models.albef.tasks.common import Texts, check_evaluating, fuse_first, runs
from fastvlp.ops.packing import PairLayout, TextLayout

NOT_SCORED = -100.0
DEFAULT_WORKSPACE_BYTES = 256 << 20


class ImageSet(NamedTuple):
    """Encoded images."""

    tokens: Tensor  # [n, L, vision_width], on any device
    features: Tensor  # [n, embed_dim], unit rows


class TextSet(NamedTuple):
    """Encoded texts, before fusion."""

    tokens: Tensor  # [total, text_width], packed, on any device
    lengths: Tensor  # int64 [n], on the host
    features: Tensor  # [n, embed_dim], unit rows


class Scores(NamedTuple):
    """The matching logit of candidates, float32; -100 elsewhere."""

    text_to_image: Tensor  # [texts, images]
    image_to_text: Tensor  # [images, texts]


@torch.no_grad()
def encode_images(
    model: Albef, batches: Iterable[Tensor], storage: torch.device | str = "cpu"
) -> ImageSet:
    """Images [n, 3, image_size, image_size] in batches; their tokens are kept on `storage`."""
    check_evaluating(model)
    tokens, features = [], []
    for images in batches:
        encoded = model.student.encode_image(images)
        tokens.append(encoded.to(storage))
        features.append(model.student.image_features(encoded))
    return ImageSet(torch.cat(tokens), torch.cat(features))


@torch.no_grad()
def encode_texts(
    model: Albef,
    batches: Iterable[tuple[Tensor, Tensor | list[int]]],
    storage: torch.device | str = "cpu",
) -> TextSet:
    """Texts in batches of ids [n, length] and masks or lengths; tokens are kept on `storage`."""
    check_evaluating(model)
    student, device = model.student, model.temp.device
    tokens, lengths, features = [], [], []
    for ids, mask in batches:
        texts = Texts.make(model.config, ids, mask, device)
        if model.reference:
            encoded = student.encode_padded(texts.ids, texts.mask)[texts.mask]
        else:
            encoded = student.encode_text(texts.ids, texts.layout)
        tokens.append(encoded.to(storage))
        lengths += texts.layout.lengths
        features.append(student.text_features(texts.layout.first(encoded)))
    return TextSet(torch.cat(tokens), torch.tensor(lengths, dtype=torch.int64), torch.cat(features))


@torch.no_grad()
def rerank(
    model: Albef,
    images: ImageSet,
    texts: TextSet,
    k: int,
    *,
    group: dist.ProcessGroup | None = None,
    own: Tensor | None = None,
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
) -> Scores:
    """Scores of the k best candidates of every image and of every text.

    Args:
        model: in evaluation mode.
        images, texts: the whole sets, of `encode_images` and `encode_texts`.
        k: candidates a query; more than there are means all.
        group: every rank calls with the same sets and scores the pairs of its share of the images;
            all get the whole result.
        own: int64 on the host, rising; the numbers of the images whose tokens are in `images`,
            where each rank keeps the tokens of another share of them and the features of all. It
            scores the pairs of those.
        workspace_bytes: about how much memory similarities and fusion may use at a time.

    Returns:
        Scores on the features' device.

    Raises:
        ValueError: an argument is not as described.
        RuntimeError: the model is in training mode; with a group, on every rank, when one rank
            fails or its sets are others.
    """
    with reporting(group, "rerank"):
        check_evaluating(model)
        _check(images, texts, k)
        own = _own(images, own, group)
        text_of_image = _best(images.features, texts.features, k, workspace_bytes)
        image_of_text = _best(texts.features, images.features, k, workspace_bytes)
        # A pair's number is image * texts + text: sorted, the pairs of an image lie together.
        count = len(texts.lengths)
        here = torch.arange(len(images.features))[:, None] * count + text_of_image
        there = image_of_text * count + torch.arange(count)[:, None]
        pairs, back = torch.cat([here.flatten(), there.flatten()]).unique(return_inverse=True)
    scores = _match_sharded(
        model, images, texts, pairs // count, pairs % count, own, group, workspace_bytes
    )
    device = images.features.device
    both = scores.to(device)[back.to(device)].split([here.numel(), there.numel()])
    result = []
    for chosen, found, shape in (
        (image_of_text, both[1], (count, len(images.features))),
        (text_of_image, both[0], (len(images.features), count)),
    ):
        full = torch.full(shape, NOT_SCORED, device=device)
        result.append(full.scatter_(1, chosen.to(device), found.view(chosen.shape)))
    return Scores(*result)


def _check(images: ImageSet, texts: TextSet, k: int) -> None:
    if type(k) is not int or k < 1:
        raise ValueError(f"k: expected a whole number above 0, got {k!r}")
    if not len(images.features):
        raise ValueError("images: expected one or more, got none")
    if not len(texts.lengths) or len(texts.features) != len(texts.lengths):
        raise ValueError(
            f"texts: expected features of each of {len(texts.lengths)} texts, one or more, got "
            f"{len(texts.features)}"
        )
    if int(texts.lengths.sum()) != len(texts.tokens):
        raise ValueError(
            f"texts: expected {int(texts.lengths.sum())} tokens as the lengths say, got "
            f"{len(texts.tokens)}"
        )


def _own(images: ImageSet, own: Tensor | None, group) -> tuple[Tensor, Tensor]:
    """The images that this rank scores, and where among `images.tokens` they are."""
    count, given = len(images.features), len(images.tokens)
    alone = not spans_ranks(group)
    if own is None or alone:
        if given != count:
            raise ValueError(
                f"images: expected features of each of {given} images, or `own` and a group that "
                f"has the tokens of the others, got {count}"
            )
        # Neighbours go to different ranks, so that no rank has all images of many candidates.
        mine = torch.arange(count) if alone else torch.arange(group.rank(), count, group.size())
        return mine, mine
    rising = own.numel() == given and bool((own.diff() > 0).all())
    if not rising or given and not 0 <= int(own[0]) <= int(own[-1]) < count:
        raise ValueError(
            f"own: expected the numbers, rising and below {count}, of the {given} images whose "
            f"tokens are given, got {own}"
        )
    return own, torch.arange(given)


def _best(queries: Tensor, keys: Tensor, k: int, workspace_bytes: int) -> Tensor:
    """The k keys of the largest dot product with each query, int64 [queries, k] on the host."""
    rows = max(1, workspace_bytes // (2 * len(keys) * queries.element_size()))
    k = min(k, len(keys))
    return torch.cat([(part @ keys.T).topk(k, dim=1).indices.cpu() for part in queries.split(rows)])


def _match_sharded(model, images, texts, image, text, own, group, workspace_bytes) -> Tensor:
    """The score of each pair; over ranks each one's own pairs, added up."""
    with reporting(group, "rerank"):
        row = torch.full((len(images.features),), -1)
        row[own[0]] = own[1]
        mine = (row[image] >= 0).nonzero()[:, 0]
        found = _match(model, images.tokens, texts, row[image[mine]], text[mine], workspace_bytes)
    if not spans_ranks(group):
        return found
    facts = {"images": len(images.features), "texts": len(texts.lengths), "pairs": len(image)}
    chosen = {"image": image, "text": text}
    facts |= {f"checksum of each pair's {n}": crc32(t.numpy().tobytes()) for n, t in chosen.items()}
    validate_across_ranks(group, "rerank", facts=facts)
    scores = torch.zeros(len(image), device=group_device(group))
    scores[mine.to(scores.device)] = found.to(scores.device)
    dist.all_reduce(scores, group=group)
    return scores


def _match(model: Albef, tokens: Tensor, texts: TextSet, image, text, workspace_bytes) -> Tensor:
    """The score of each pair (image[p], text[p]), sorted by image: float32."""
    config, device = model.config, model.temp.device
    layers = model.student.text_encoder.fusion
    size = model.temp.element_size() * config.text_width
    # Half of the workspace for keys and values, half for the tokens of a call with a layer's
    # intermediate results.
    most_images = max(1, workspace_bytes // (4 * len(layers) * tokens.shape[1] * size))
    most_rows = max(1, workspace_bytes // (24 * size))
    starts = texts.lengths.cumsum(0) - texts.lengths
    scores = torch.empty(len(image), device=device)
    for chosen, part in _by_images(image, most_images):
        near = tokens[chosen].to(device, model.temp.dtype)
        keys = None if model.reference else [layer.project_images(near) for layer in layers]
        place = torch.searchsorted(chosen, image[part])
        for call in runs(texts.lengths[text[part]], most_rows):
            x, lengths, local = _gather(texts, starts, text[part][call], device)
            layout = TextLayout.from_lengths(lengths, int(lengths.max()), device)
            if model.reference:
                first = _fuse_plain(model, layout, x, local, near, place[call])
            else:
                first = _fuse(layers, layout, x, local, keys, place[call])
            rows = torch.arange(part.start, part.stop)[call].to(device)
            scores[rows] = model.itm_head(first)[:, 1].float()
    return scores


def _by_images(image: Tensor, most: int) -> Iterator[tuple[Tensor, slice]]:
    """At most so many images at a time, and their run of the pairs."""
    distinct, counts = image.unique_consecutive(return_counts=True)
    begin = 0
    for at in range(0, len(distinct), most):  # of no pairs, such as a rank may have, no time
        end = begin + int(counts[at : at + most].sum())
        yield distinct[at : at + most], slice(begin, end)
        begin = end


def _gather(texts: TextSet, starts: Tensor, text: Tensor, device) -> tuple[Tensor, ...]:
    """Packed tokens of the distinct texts, their lengths, and each pair's place among them."""
    distinct, local = text.unique(return_inverse=True)
    lengths = texts.lengths[distinct]
    within = torch.arange(int(lengths.sum()))
    within -= (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    rows = starts[distinct].repeat_interleave(lengths) + within
    return texts.tokens[rows.to(texts.tokens.device)].to(device), lengths, local


def _fuse(layers, layout: TextLayout, x: Tensor, text: Tensor, keys, image: Tensor) -> Tensor:
    """First fused tokens of the pairs, by the cached keys and values of their images."""
    low, high = int(image[0]), int(image[-1]) + 1
    pairs = PairLayout.make(layout, text, image - low, high - low)
    cached = [tuple(t[low:high] for t in each) for each in keys]
    return fuse_first(layers, pairs.expand(x), pairs, cached)


def _fuse_plain(model: Albef, layout, x: Tensor, text: Tensor, tokens: Tensor, image) -> Tensor:
    """`_fuse` of padded texts, each with a copy of its image."""
    padded = layout.unpack(x)
    mask = torch.arange(padded.shape[1]) < torch.tensor(layout.lengths)[:, None]
    device = x.device
    text, image = text.to(device), image.to(device)
    return model.student.fuse_padded(padded[text], mask.to(device)[text], tokens[image])[:, 0]
