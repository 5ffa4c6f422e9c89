"""The image transforms of CLIP, ViLT and ALBEF, by name.

A recipe says what is to be done to an image of a given size, as a ``Plan`` of numbers; the
backends carry plans out. All randomness comes in as uniform numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from fastvlp.data.images.randaugment import AlbefRandAugment, Operation, ViltRandAugment

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)

Box = tuple[int, int, int, int]  # left, top, width, height


@dataclass(frozen=True)
class Plan:
    """What is done to one image, in the order of the fields.

    ``before`` on the whole image; cut out ``crop``; resize it to ``size`` (width, height), bicubic
    and antialiased; keep ``window`` of that; mirror it if ``flip``; ``after`` on what is left.
    """

    before: tuple[Operation, ...]
    crop: Box
    size: tuple[int, int]
    window: Box
    flip: bool = False
    after: tuple[Operation, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Recipe:
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    # Whether images of a batch differ in size, are padded and come with a pixel mask.
    padded = False
    # Whether the recipe is for training: random, and best with whole batches only.
    training = False
    # Uniform numbers that `plan` takes.
    uses = 0


@dataclass(frozen=True, kw_only=True)
class RandomCrop(_Recipe):
    """A random part of the image, resized to a square.

    The part has ``scale`` of the image's area and an aspect ratio within ``ratio``, as
    torchvision's RandomResizedCrop draws them; then a flip with probability ``flip``.
    """

    size: int = 224
    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    augment: AlbefRandAugment | ViltRandAugment | None = None

    training = True
    # Ten attempts at area and ratio, the place, the flip.
    _fixed_uses = 23

    @property
    def uses(self) -> int:
        return self._fixed_uses + (self.augment.uses if self.augment else 0)

    def plan(self, width: int, height: int, uniforms: Sequence[float]) -> Plan:
        after = ()
        if self.augment:
            after = self.augment.sample(self.size, self.size, uniforms[self._fixed_uses :])
        side = self.size
        return Plan(
            (),
            self._crop(width, height, uniforms),
            (side, side),
            (0, 0, side, side),
            bool(uniforms[22] < self.flip),
            after,
        )

    def _crop(self, width: int, height: int, uniforms: Sequence[float]) -> Box:
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for for_area, for_ratio in zip(uniforms[0:20:2], uniforms[1:20:2], strict=True):
            area = width * height * (self.scale[0] + for_area * (self.scale[1] - self.scale[0]))
            aspect = math.exp(low + for_ratio * (high - low))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                x, y = uniforms[20] * (width - w + 1), uniforms[21] * (height - h + 1)
                return int(x), int(y), w, h
        # The image is too long or too tall for any: its middle, as near to the ratios as it goes.
        w, h = width, height
        if width / height < self.ratio[0]:
            h = max(1, round(width / self.ratio[0]))
        elif width / height > self.ratio[1]:
            w = max(1, round(height * self.ratio[1]))
        return (width - w) // 2, (height - h) // 2, w, h


@dataclass(frozen=True, kw_only=True)
class CentreCrop(_Recipe):
    """The shorter side resized to ``size``, then the middle square."""

    size: int = 224

    def plan(self, width: int, height: int, uniforms: Sequence[float]) -> Plan:
        # The longer side is cut to a whole number, not rounded: it decides where the middle lies.
        if width <= height:
            w, h = self.size, int(self.size * height / width)
        else:
            w, h = int(self.size * width / height), self.size
        left, top = round((w - self.size) / 2), round((h - self.size) / 2)
        return Plan((), (0, 0, width, height), (w, h), (left, top, self.size, self.size))


@dataclass(frozen=True, kw_only=True)
class SquareResize(_Recipe):
    """The whole image resized to a square, whatever its shape."""

    size: int = 384

    def plan(self, width: int, height: int, uniforms: Sequence[float]) -> Plan:
        side = self.size
        return Plan((), (0, 0, width, height), (side, side), (0, 0, side, side))


@dataclass(frozen=True, kw_only=True)
class KeepAspect(_Recipe):
    """The shorter side resized to ``shorter`` unless the longer would pass ``longer``.

    Both sides are cut to multiples of ``multiple`` (one at the least). ``augment`` works on the
    image before it is resized, as ViLT has it.
    """

    shorter: int = 384
    longer: int = 639
    multiple: int = 32
    augment: ViltRandAugment | AlbefRandAugment | None = None
    mean: tuple[float, float, float] = HALF
    std: tuple[float, float, float] = HALF
    training: bool = False

    padded = True

    @property
    def uses(self) -> int:
        return self.augment.uses if self.augment else 0

    def plan(self, width: int, height: int, uniforms: Sequence[float]) -> Plan:
        scale = self.shorter / min(width, height)
        w, h = (self.shorter, scale * height) if width <= height else (scale * width, self.shorter)
        if max(w, h) > self.longer:
            scale = self.longer / max(w, h)
            w, h = w * scale, h * scale
        unit = self.multiple
        w, h = (max(unit, int(side + 0.5) // unit * unit) for side in (w, h))
        before = self.augment.sample(width, height, uniforms) if self.augment else ()
        return Plan(before, (0, 0, width, height), (w, h), (0, 0, w, h))


Recipe = RandomCrop | CentreCrop | SquareResize | KeepAspect

RECIPES: dict[str, Recipe] = {
    "clip_train": RandomCrop(),
    "clip_eval": CentreCrop(),
    "vilt_train": KeepAspect(training=True),
    "vilt_finetune": KeepAspect(training=True, augment=ViltRandAugment()),
    "vilt_eval": KeepAspect(),
    "albef_pretrain": RandomCrop(size=256, scale=(0.2, 1.0), flip=0.5, augment=AlbefRandAugment()),
    "albef_finetune": RandomCrop(size=384, scale=(0.5, 1.0), flip=0.5, augment=AlbefRandAugment()),
    "albef_eval": SquareResize(),
}


def recipe(name: str, **changes: Any) -> Recipe:
    """The recipe of this name, with some parameters changed.

    Raises:
        ValueError: there is no recipe of this name, or it has no such parameter.
    """
    if name not in RECIPES:
        raise ValueError(f"recipe: expected one of {', '.join(RECIPES)}; got {name!r}")
    found = RECIPES[name]
    known = [field.name for field in fields(found)]
    if unknown := sorted(set(changes) - set(known)):
        raise ValueError(
            f"recipe {name!r}: no parameter {unknown[0]!r}; expected some of {', '.join(known)}"
        )
    return replace(found, **changes)
