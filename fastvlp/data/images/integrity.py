"""Whether the bytes of an image file are whole, without decoding them where that can be told.

A JPEG that ends with its end marker and a PNG whose checksums fit decode; every other file is given
to Pillow, which is the judge.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fastvlp.data.images.conversion import RgbConversion
from fastvlp.data.optional import require

if TYPE_CHECKING:
    from PIL.Image import Image

_JPEG, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
_PNG = b"\x89PNG\r\n\x1a\n"
# Frame headers of the Huffman-coded kinds: baseline, extended sequential, progressive.
_FRAMES = (0xC0, 0xC1, 0xC2)
# More pixels than this are an attack or an accident, Pillow says; here they are a broken image.
MOST_PIXELS = 178_956_970


@dataclass(frozen=True)
class JpegHeader:
    """What the header of a JPEG says, and whether the file ends with its end marker."""

    width: int
    height: int
    bits: int
    components: int
    adobe: bool
    ends: bool

    @property
    def plain(self) -> bool:
        """Grey or YCbCr of 8 bits with nothing special: every decoder agrees on the pixels."""
        usual = self.bits == 8 and self.components in (1, 3) and not self.adobe
        return usual and self.ends and self.width * self.height <= MOST_PIXELS


def jpeg_header(content: bytes) -> JpegHeader | None:
    """The header of a JPEG, or None where the content is none or is cut before its frame header."""
    if content[:2] != _JPEG:
        return None
    at, adobe = 2, False
    while at + 4 <= len(content) and content[at] == 0xFF:
        marker = content[at + 1]
        if marker == 0xFF:  # fill
            at += 1
            continue
        (length,) = struct.unpack_from(">H", content, at + 2)
        if marker in _FRAMES and at + 10 <= len(content):
            bits, height, width, components = struct.unpack_from(">BHHB", content, at + 4)
            # Cameras and servers fill files up with zeros.
            ends = content[-2:] == _JPEG_END or content[-64:].rstrip(b"\0")[-2:] == _JPEG_END
            return JpegHeader(width, height, bits, components, adobe, ends)
        if marker == 0xEE and content[at + 4 : at + 9] == b"Adobe":
            # 1 is YCbCr, what a JPEG without this segment is.
            adobe = content[at + 15 : at + 16] != b"\x01"
        at += 2 + length
    return None


def fault(content: bytes, decode: bool = False) -> str:
    """What is wrong with an image file, or "" where nothing is.

    Args:
        content: the bytes of the file.
        decode: decode it in any case. Without this a few damages inside of a JPEG's entropy-coded
            data that a decoder refuses can pass.
    """
    if not content:
        return "the image is empty"
    if not decode:
        header = jpeg_header(content)
        if header and header.ends and 0 < header.width * header.height <= MOST_PIXELS:
            return ""
        if content.startswith(_PNG) and _png_is_whole(content):
            return ""
    try:
        decode_rgb(content)
    except ImageFault as error:
        return str(error)
    return ""


class ImageFault(Exception):
    """An image file that cannot be decoded, and why."""


def decode_rgb(content: bytes, convert: RgbConversion = RgbConversion()) -> np.ndarray:
    """The pixels of an image file, uint8 ``[height, width, 3]``.

    Args:
        content: the bytes of the file.
        convert: how they become 8-bit RGB.

    Raises:
        ImageFault: Pillow cannot decode the file, or it has too many pixels.
    """
    return np.array(open_rgb(content, convert))


def open_rgb(content: bytes, convert: Callable[[Image], Image] = RgbConversion()) -> Image:
    """The same as a Pillow image."""
    pil = require("PIL.Image")
    try:
        with warnings.catch_warnings():
            # Of images of suspicious size and of palettes with odd transparency.
            warnings.simplefilter("ignore")
            image = pil.open(io.BytesIO(content))
            width, height = image.size
            if width * height > MOST_PIXELS:
                raise ImageFault(
                    f"the image has {width} x {height} pixels, more than {MOST_PIXELS:,}"
                )
            return convert(image)
    except (ImageFault, MemoryError):
        raise
    except Exception as error:  # Pillow's plugins raise nearly anything
        raise ImageFault(f"the image cannot be decoded: {error or type(error).__name__}") from error


def _png_is_whole(content: bytes) -> bool:
    at = len(_PNG)
    while at + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, at)
        end = at + 12 + length
        if end > len(content):
            return False
        body = memoryview(content)[at + 4 : end - 4]
        if zlib.crc32(body) != int.from_bytes(content[end - 4 : end], "big"):
            return False
        kind = bytes(body[:4])
        if kind == b"IHDR":
            width, height = struct.unpack_from(">II", body, 4)
            if not 0 < width * height <= MOST_PIXELS:
                return False
        if kind == b"IEND":
            return True
        at = end
    return False
