"""Features for itc_throughput.py: of real image–caption pairs where that is possible.

The OpenMoji pairs, or some of them, are encoded once by the tiny CLIP and kept in the cache
directory. What cannot be had is replaced by random features, and every description says which it
was.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from _harness.measure import Missing
from _harness.timing import progress, status
from torch import Tensor

# Tiled copies differ by noise of this norm, so that no pair occurs twice.
NOISE = 0.1
# Images' noise against captions of norm 1. Nearer pairs would be told apart with certainty
# at s = 100, and gradients that vanish measure nothing.
RANDOM_NOISE = 5.0
BATCH = 128
# Pairs of each split that a run takes which is to print its first table soon.
LIMIT = 256


@dataclass(frozen=True)
class Source:
    """Where features come from: a file of cached ones, or None for random ones."""

    path: Path | None
    about: str


RANDOM = Source(None, "random: captions are unit Gaussian vectors, images the same plus noise")


def prepare(pairs: str) -> tuple[Source, list[Missing]]:
    """The source of features, encoding and caching real pairs where that is possible.

    pairs: "random" makes random ones. "all" takes every real pair; where they are not yet in the
    cache that takes about 20 s. "some" takes LIMIT of each split at most, in a third of that time,
    unless all of them are there. "cached" takes either, and random ones where neither is there.
    What is missing is said.
    """
    if pairs == "random":
        return RANDOM, []
    try:
        every, model = _cache_file()
        some = every.with_stem(f"{every.stem}-{LIMIT}")
        found = next((path for path in (every, some) if path.exists()), None)
        if pairs == "all":
            path, limit = every, None
        else:
            path, limit = found or some, LIMIT
        if pairs == "cached" and found is None:
            return RANDOM, [
                Missing(
                    "features of real pairs", "not yet in the cache", "run once without --quick"
                )
            ]
        if not path.exists():
            _encode(path, limit)
    except ImportError as error:
        return RANDOM, [Missing("features of real pairs", str(error), "pip install -e '.[bench]'")]
    return Source(path, f"OpenMoji pairs encoded by the {model} tiny CLIP"), []


def _cache_file() -> tuple[Path, str]:
    """Where all features belong, and whether they are of a "trained" or an "untrained" model.

    The file is named after the weights, so that another training has its own features.
    """
    from fastvlp.data.cache import cache_root

    weights = Path(f"{_checkpoint()}.safetensors")
    folder = cache_root() / "itc_features"
    if not weights.exists():
        return folder / "untrained.safetensors", "untrained"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:16]
    return folder / f"{digest}.safetensors", "trained"


def _checkpoint() -> Path:
    """The path, without suffix, to which examples/train_clip_openmoji.py saves its model."""
    from fastvlp.data.cache import cache_root

    return cache_root() / "openmoji_clip" / "tiny_clip"


def _encode(path: Path, limit: int | None) -> None:
    """Encode at most `limit` pairs of each split and write them to `path`, whole or not at all."""
    from fastvlp.data import openmoji
    from fastvlp.data.optional import require
    from fastvlp.data.shards.write import atomic_file

    save = require("safetensors.torch", "bench").save
    with status("rendering the OpenMoji pairs"):
        data = openmoji.build(size=64, progress=False, limit=limit)
    splits = [data.load(split) for split in data.records]
    images = torch.cat([images for images, _ in splits])
    captions = [caption for _, captions in splits for caption in captions]
    model, tokenizer = _model(captions)
    tokens = tokenizer(captions)
    image, text = [], []
    with torch.inference_mode(), progress("encoding the pairs") as note:
        for start in range(0, len(images), BATCH):
            part = slice(start, start + BATCH)
            note(f"{start} of {len(images)}")
            pixels = images[part].float() / 127.5 - 1
            image.append(F.normalize(model.encode_image(pixels), dim=-1))
            text.append(F.normalize(model.encode_text(tokens[part]), dim=-1))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(save({"image": torch.cat(image), "text": torch.cat(text)}))


def _model(captions: list[str]) -> tuple[torch.nn.Module, Callable[[list[str]], Tensor]]:
    """The tiny CLIP that the example trained, or the same model with seeded random weights."""
    from fastvlp.data.text import CaptionTokenizer, train_tokenizer
    from fastvlp.models import clip

    checkpoint = _checkpoint()
    if Path(f"{checkpoint}.safetensors").exists():
        return clip.load(checkpoint), CaptionTokenizer.load(f"{checkpoint}_tokenizer.json")
    tokenizer = train_tokenizer(captions)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = clip.create(
            "tiny", vocab_size=tokenizer.vocab_size, context_length=tokenizer.context_length
        )
    return model.eval(), tokenizer


@functools.lru_cache(maxsize=1)
def _load(path: Path) -> tuple[Tensor, Tensor]:
    from safetensors.torch import load_file

    stored = load_file(path)
    return stored["image"], stored["text"]


def count(source: Source) -> int | None:
    """How many real pairs there are; None: as many as asked for are made."""
    return None if source.path is None else len(_load(source.path)[0])


def pairs(source: Source, n: int, dim: int) -> tuple[Tensor, Tensor]:
    """image, text: [n, dim] float32, unit rows; the same for the same arguments."""
    generator = torch.Generator().manual_seed(n)
    if source.path is None:
        text = F.normalize(torch.randn(n, dim, generator=generator), dim=1)
        noise = torch.randn(n, dim, generator=generator) * (RANDOM_NOISE / dim**0.5)
        return F.normalize(text + noise, dim=1), text
    image, text = _load(source.path)
    order = torch.randperm(len(image), generator=generator).repeat(-(-n // len(image)))[:n]
    turn = rotation(image.shape[1], dim)
    return (
        _spread(image[order], turn, len(image), generator),
        _spread(text[order], turn, len(text), generator),
    )


def _spread(
    features: Tensor, turn: Tensor | None, distinct: int, generator: torch.Generator
) -> Tensor:
    if turn is not None:
        features = features @ turn
    copies = features[distinct:]
    size = NOISE / features.shape[1] ** 0.5
    copies += size * torch.randn(copies.shape, generator=generator)
    return F.normalize(features, dim=1)


def rotation(width: int, dim: int) -> Tensor | None:
    """A fixed random [width, dim] matrix with orthonormal rows or columns; None if equal."""
    if width == dim:
        return None
    generator = torch.Generator().manual_seed(dim)
    square, _ = torch.linalg.qr(torch.randn(max(width, dim), min(width, dim), generator=generator))
    return square if width > dim else square.T


def describe(source: Source, n: int, dim: int) -> str:
    """What `pairs(source, n, dim)` are, in a sentence without its full stop."""
    distinct = count(source)
    if distinct is None:
        return source.about
    text = f"{distinct} {source.about}"
    if n > distinct:
        text += f", tiled to {n} with Gaussian noise of norm {NOISE}"
    width = _load(source.path)[0].shape[1]
    if width != dim:
        text += f", turned from width {width} to {dim} by a random orthogonal projection"
    return text
