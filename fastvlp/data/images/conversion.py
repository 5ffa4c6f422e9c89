"""8-bit RGB from images of every mode: transparency on a background, deep images by their range.

Pillow's own ``convert("RGB")`` keeps whatever colour lies under transparent pixels, turns 16-bit
greys above 255 white and clips floats to whole numbers from 0 to 255.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fastvlp.data.optional import require

if TYPE_CHECKING:
    from PIL.Image import Image

_DEEP = ("I", "F")  # and "I;16" with its byte orders
# Formats whose 32-bit greys are 16-bit samples that Pillow widened.
_WIDENED = ("PNG", "PPM")


@dataclass(frozen=True)
class RgbConversion:
    """How the pixels of an image become 8-bit RGB.

    - Transparent pixels are composited onto ``background``.
    - 16-bit greys are divided by 257, so that 65535 is white.
    - Floats from 0 to 1 are multiplied by 255. Other floats, and 32-bit integers, are stretched
      from the least to the largest finite value of the image; NaN counts as the least.
    - All other modes are converted by Pillow. EXIF orientation is not applied, as in the systems'
      own code.

    Args:
        background: a colour name or ``#rrggbb`` as Pillow knows them, or three integers, 0 to 255.
        method: "range" for the above, or "pillow" for ``Image.convert("RGB")`` alone, which is what
            checkpoints trained with torchvision's transforms saw; ``background`` has no effect.

    Raises:
        ValueError: the colour or the method is unknown.

    Examples:
        >>> from PIL import Image
        >>> clear = Image.new("RGBA", (1, 1), (0, 0, 0, 0))
        >>> RgbConversion(background="#ff0000")(clear).getpixel((0, 0))
        (255, 0, 0)
    """

    background: str | tuple[int, int, int] = "white"
    method: str = "range"

    def __post_init__(self) -> None:
        if self.method not in ("range", "pillow"):
            raise ValueError(f"method: expected 'range' or 'pillow', got {self.method!r}")
        colour = self.background
        if isinstance(colour, str):
            try:
                colour = require("PIL.ImageColor").getrgb(colour)[:3]
            except ValueError:
                colour = ()
        values = tuple(colour) if isinstance(colour, tuple | list) else ()
        if len(values) != 3 or not all(isinstance(v, int) and 0 <= v <= 255 for v in values):
            raise ValueError(
                "background: expected a colour such as 'white', '#ffffff' or (255, 255, 255), "
                f"got {self.background!r}"
            )
        object.__setattr__(self, "background", values)

    def __call__(self, image: Image) -> Image:
        """The Pillow image as one of mode "RGB"."""
        if self.method == "range":
            if image.mode in _DEEP or image.mode.startswith("I;16"):
                return self._from_deep(image)
            if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
                return self._composited(image.convert("RGBA"))
        return image.convert("RGB")

    def _composited(self, rgba):
        pil = require("PIL.Image")
        least_alpha, _ = rgba.getchannel("A").getextrema()
        if least_alpha < 255:
            rgba = pil.alpha_composite(pil.new("RGBA", rgba.size, (*self.background, 255)), rgba)
        return rgba.convert("RGB")

    def _from_deep(self, image):
        pil = require("PIL.Image")
        values = np.asarray(image)
        rgb = pil.fromarray(_eight_bits(values, image.format)).convert("RGB")
        clear = image.info.get("transparency")
        if isinstance(clear, int):  # a grey that stands for "nothing here"
            mask = pil.fromarray((values == clear).astype(np.uint8) * 255)
            rgb.paste(self.background, mask=mask)
        return rgb


def _eight_bits(values: np.ndarray, form: str | None) -> np.ndarray:
    """Greys of more than 8 bits as uint8 of the same shape."""
    if values.dtype.itemsize == 2 or (values.dtype.kind != "f" and form in _WIDENED):
        sixteen = np.clip(values, 0, 65535).astype(np.uint32)
        return ((sixteen * 255 + 32767) // 65535).astype(np.uint8)
    floating, values = values.dtype.kind == "f", values.astype(np.float64)
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    if floating and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    # Halves, so that the difference of two extreme floats does not overflow.
    scaled = (values / 2 - low / 2) / max(high / 2 - low / 2, np.finfo(np.float64).tiny)
    clipped = np.clip(np.nan_to_num(scaled, nan=0.0, posinf=1.0, neginf=0.0), 0.0, 1.0)
    return np.rint(clipped * 255).astype(np.uint8)
