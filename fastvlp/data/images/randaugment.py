"""RandAugment (Cubuk et al. 2020) in the two forms that ViLT and ALBEF train with.

An augmentation is drawn as a list of operations with numbers in them, so that any implementation
can carry it out; ``apply`` is the one in Pillow's own functions.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

from fastvlp.data.optional import require


class Kind(enum.IntEnum):
    """Operations, numbered as the compiled kernel numbers them."""

    AUTO_CONTRAST = 0
    EQUALIZE = 1
    POSTERIZE = 2
    SOLARIZE = 3
    SOLARIZE_ADD = 4
    COLOR = 5
    CONTRAST = 6
    BRIGHTNESS = 7
    SHARPNESS = 8
    # Geometry. values: Pillow's six numbers, which take an output point to the input's.
    NEAREST = 9
    BILINEAR = 10


@dataclass(frozen=True)
class Operation:
    """One operation: its kind, its number or six numbers, and what geometry leaves empty."""

    kind: Kind
    values: tuple[float, ...] = ()
    fill: int = 0


@dataclass(frozen=True)
class ViltRandAugment:
    """ViLT's: ``count`` of 14 operations, each at magnitude ``magnitude`` of 30.

    The list is that of the public PyTorch implementation without Invert and Cutout (Kim et al.
    2021, section 3.4). Two of its habits are kept, since the published numbers have them:
    Posterize leaves one bit at magnitude 9, and Solarize is weaker for higher magnitudes. Geometry
    takes the nearest pixel and fills with black.
    """

    count: int = 2
    magnitude: float = 9.0

    names = (
        "AutoContrast", "Equalize", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color",
        "Contrast", "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY",
    )  # fmt: skip

    @property
    def uses(self) -> int:
        """Uniform numbers that ``sample`` takes."""
        return 2 * self.count

    def sample(self, width: int, height: int, uniforms: Sequence[float]) -> tuple[Operation, ...]:
        """The operations for an image of this size, from uniform numbers in [0, 1)."""
        found = []
        for chosen, sign in zip(uniforms[0::2], uniforms[1::2], strict=True):
            name = self.names[int(chosen * len(self.names))]
            found.append(self.operation(name, width, height, sign > 0.5))
        return tuple(found)

    def operation(self, name: str, width: int, height: int, negative: bool) -> Operation:
        level = self.magnitude / 30
        if name in _GEOMETRY:
            largest = {"Rotate": 30.0, "ShearX": 0.3, "ShearY": 0.3}.get(name, 100.0)
            value = -level * largest if negative else level * largest
            return Operation(Kind.NEAREST, _matrix(name, value, width, height), fill=0)
        kind, low, high = {
            "AutoContrast": (Kind.AUTO_CONTRAST, 0, 1),
            "Equalize": (Kind.EQUALIZE, 0, 1),
            "Posterize": (Kind.POSTERIZE, 0, 4),
            "Solarize": (Kind.SOLARIZE, 0, 256),
            "SolarizeAdd": (Kind.SOLARIZE_ADD, 0, 110),
            "Color": (Kind.COLOR, 0.1, 1.9),
            "Contrast": (Kind.CONTRAST, 0.1, 1.9),
            "Brightness": (Kind.BRIGHTNESS, 0.1, 1.9),
            "Sharpness": (Kind.SHARPNESS, 0.1, 1.9),
        }[name]
        value = level * (high - low) + low
        if kind is Kind.POSTERIZE:
            value = max(1, int(value))
        if kind is Kind.SOLARIZE_ADD:
            value = int(value)
        return Operation(kind, (float(value),))


@dataclass(frozen=True)
class AlbefRandAugment:
    """ALBEF's: ``count`` draws from 10 operations, each carried out with probability 1/2.

    Magnitude ``magnitude`` of 10 (Li et al. 2021, appendix A). Geometry interpolates bilinearly
    and fills with grey 128; at the border of the moved image pixels are not mixed with the grey.
    """

    count: int = 2
    magnitude: float = 7.0
    probability: float = 0.5

    names = (
        "Identity", "AutoContrast", "Equalize", "Brightness", "Sharpness", "ShearX", "ShearY",
        "TranslateX", "TranslateY", "Rotate",
    )  # fmt: skip

    @property
    def uses(self) -> int:
        """Uniform numbers that ``sample`` takes."""
        return 3 * self.count

    def sample(self, width: int, height: int, uniforms: Sequence[float]) -> tuple[Operation, ...]:
        """The operations for an image of this size, from uniform numbers in [0, 1)."""
        found = []
        for chosen, gate, sign in zip(uniforms[0::3], uniforms[1::3], uniforms[2::3], strict=True):
            name = self.names[int(chosen * len(self.names))]
            if gate < self.probability and name != "Identity":
                found.append(self.operation(name, width, height, sign > 0.5))
        return tuple(found)

    def operation(self, name: str, width: int, height: int, negative: bool) -> Operation:
        level = self.magnitude / 10
        if name in _GEOMETRY:
            largest = {"Rotate": 30.0, "ShearX": 0.3, "ShearY": 0.3}.get(name, 10.0)
            value = -level * largest if negative else level * largest
            return Operation(Kind.BILINEAR, _matrix(name, value, width, height), fill=128)
        if name in ("Brightness", "Sharpness"):
            kind = Kind.BRIGHTNESS if name == "Brightness" else Kind.SHARPNESS
            return Operation(kind, (level * 1.8 + 0.1,))
        return Operation(Kind.AUTO_CONTRAST if name == "AutoContrast" else Kind.EQUALIZE)


_GEOMETRY = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")


def _matrix(name: str, value: float, width: int, height: int) -> tuple[float, ...]:
    if name == "ShearX":
        return 1.0, value, 0.0, 0.0, 1.0, 0.0
    if name == "ShearY":
        return 1.0, 0.0, 0.0, value, 1.0, 0.0
    if name == "TranslateX":
        return 1.0, 0.0, value, 0.0, 1.0, 0.0
    if name == "TranslateY":
        return 1.0, 0.0, 0.0, 0.0, 1.0, value
    # Counter-clockwise about the middle. Pillow rounds these two as well.
    cos, sin = (round(f(-math.radians(value)), 15) for f in (math.cos, math.sin))
    x, y = width / 2, height / 2
    return cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y


def apply(image, operation: Operation):
    """An operation on a Pillow image, as Pillow's own functions do it."""
    ops, enhance = require("PIL.ImageOps"), require("PIL.ImageEnhance")
    value = operation.values[0] if operation.values else 0.0
    match operation.kind:
        case Kind.AUTO_CONTRAST:
            return ops.autocontrast(image)
        case Kind.EQUALIZE:
            return ops.equalize(image)
        case Kind.POSTERIZE:
            return ops.posterize(image, int(value))
        case Kind.SOLARIZE:
            return ops.solarize(image, value)
        case Kind.SOLARIZE_ADD:
            added = [min(255, max(0, i + int(value))) for i in range(256)]
            return ops.solarize(image.point(added * 3), 128)
        case Kind.COLOR:
            return enhance.Color(image).enhance(value)
        case Kind.CONTRAST:
            return enhance.Contrast(image).enhance(value)
        case Kind.BRIGHTNESS:
            return enhance.Brightness(image).enhance(value)
        case Kind.SHARPNESS:
            return enhance.Sharpness(image).enhance(value)
    pil = require("PIL.Image")
    nearest = operation.kind is Kind.NEAREST
    return image.transform(
        image.size,
        pil.Transform.AFFINE,
        operation.values,
        pil.Resampling.NEAREST if nearest else pil.Resampling.BILINEAR,
        fillcolor=(operation.fill,) * 3,
    )
