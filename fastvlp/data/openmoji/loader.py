"""The OpenMoji pairs as batches from memory, with the interface of ``fastvlp.data.loader.Loader``.

Order and augmentation are functions of seed, epoch and sample, so that a state taken after any
batch resumes at the next sample, on any number of ranks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvlp.data.openmoji.dataset import OpenMoji
from fastvlp.data.rng import bits, permutation, uniforms

# Shifts go up to a tenth of the side and scales up to 15 %. Nothing is flipped: arrows have a side.
_SHIFT, _SCALE = 0.2, 0.15


@dataclass
class Batch:
    """Some pairs: images float32 ``[n, 3, size, size]`` in -1 .. 1, what the tokenizer made of the
    captions, and ``ids`` and ``index``, int64 ``[n]``, the places in the split."""

    images: Tensor
    tokens: Any
    captions: list[str]
    ids: Tensor
    index: Tensor
    pixel_mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.captions)


class OpenMojiLoader:
    """Batches of a split, one epoch after another.

    Iterating continues where the last iteration stopped and ends with the epoch.

    Args:
        data: the built set.
        split: "train", "composition" or "concept".
        batch_size: pairs for each rank and step.
        tokenizer: takes a list of captions, gives ``batch.tokens``. One with an attribute
            ``needs_keys`` that is true is given int64 ``[n]`` besides, random numbers that are
            functions of seed, epoch and sample.
        training: shuffle, shift and scale, and leave out what fills no whole step. Otherwise the
            pairs come as they are and in their order, and the ranks divide the rest.
    """

    def __init__(
        self,
        data: OpenMoji,
        split: str,
        batch_size: int,
        tokenizer: Callable[..., Any],
        *,
        training: bool,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        self.batch_size, self.training, self.seed = batch_size, training, seed
        self.rank, self.world_size, self.device = rank, world_size, torch.device(device)
        self.split, self._tokenizer = split, tokenizer
        self._images, self.captions = data.load(split)
        about = [json.loads(sample.members["json"]) for sample in data.samples(split)]
        self.bases: list[str] = [each["base"] for each in about]
        # Captions of one drawing are captions of one image.
        drawings = {each["drawing"]: i for i, each in reversed(list(enumerate(about)))}
        self._ids = torch.tensor([drawings[each["drawing"]] for each in about])
        self.epoch = self._place = 0

    @property
    def samples(self) -> int:
        """Pairs in the split."""
        return len(self.captions)

    def __len__(self) -> int:
        """Batches that are left of this epoch, the same on every rank."""
        step, left = self.batch_size * self.world_size, self.samples - self._place
        return left // step if self.training else -(-left // step)

    def state_dict(self) -> dict[str, int]:
        """Where the loader is, after the last batch that was taken from it. Equal on all ranks."""
        return {
            "epoch": self.epoch, "place": self._place, "seed": self.seed, "samples": self.samples,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a state, which may come from another number of ranks or batch size."""
        for key in ("seed", "samples"):
            if state[key] != getattr(self, key):
                raise ValueError(
                    f"state: expected {key} {getattr(self, key)}, as this loader has it, got "
                    f"{state[key]}"
                )
        self.epoch, self._place = state["epoch"], state["place"]

    def __iter__(self) -> Iterator[Batch]:
        order = np.arange(self.samples)
        if self.training:
            order = permutation(self.seed, self.epoch, 0, self.samples)
        for _ in range(len(self)):
            size = min(self.batch_size * self.world_size, self.samples - self._place)
            share, more = divmod(size, self.world_size)
            first = self._place + self.rank * share + min(self.rank, more)
            self._place += size
            yield self._batch(order[first : first + share + (self.rank < more)])
        self.epoch, self._place = self.epoch + 1, 0

    def _batch(self, rows: np.ndarray) -> Batch:
        at = torch.from_numpy(rows)
        images = self._images[at].to(self.device, torch.float32) / 127.5 - 1
        if self.training:
            numbers = torch.from_numpy(uniforms(self.seed, self.epoch, rows, 4)).float()
            images = jittered(images, numbers.to(self.device))
        captions = [self.captions[row] for row in rows]
        keys = []
        if getattr(self._tokenizer, "needs_keys", False):
            random = bits(self.seed, self.epoch, rows, 5)[:, -1] >> np.uint64(1)
            keys = [torch.from_numpy(random.astype(np.int64))]
        tokens = self._tokenizer(captions, *keys)
        if isinstance(tokens, Tensor):
            tokens = tokens.to(self.device)
        return Batch(images, tokens, captions, self._ids[at], at)


def jittered(images: Tensor, uniforms: Tensor) -> Tensor:
    """Images shifted and scaled by numbers in [0, 1), four for each."""
    centred = 2 * uniforms - 1
    move = images.new_zeros(len(images), 2, 3)
    move[:, 0, 0] = 1 + _SCALE * centred[:, 0]
    move[:, 1, 1] = 1 + _SCALE * centred[:, 1]
    move[:, :, 2] = _SHIFT * centred[:, 2:]
    grid = F.affine_grid(move, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
