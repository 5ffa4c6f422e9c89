"""Shards of small JPEGs cut from scikit-image's photographs, good ones and broken ones."""

import functools
import io

import numpy as np
from PIL import Image
from skimage import data

from fastvlp.data.shards.write import Sample, write_shard


@functools.cache
def _photographs():
    return [getattr(data, name)() for name in ("astronaut", "chelsea", "coffee", "rocket")]


def photograph(number, width=96, height=72):
    """A part of a photograph as a Pillow image, another one for each number."""
    pixels = _photographs()[number % 4]
    if pixels.shape[0] < height or pixels.shape[1] < width:
        pixels = np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))
    generator = np.random.default_rng(number)
    top = int(generator.integers(0, pixels.shape[0] - height + 1))
    left = int(generator.integers(0, pixels.shape[1] - width + 1))
    return Image.fromarray(np.ascontiguousarray(pixels[top : top + height, left : left + width]))


def encoded(image, kind="JPEG", **options):
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def undecodable(number):
    """A JPEG that looks whole from outside and that decoders refuse: a table is gone."""
    content = bytearray(jpeg(number))
    at = content.index(b"\xff\xdb")
    return bytes(content[:at] + b"\xff\xfe" + content[at + 2 :])


@functools.cache
def jpeg(number, width=96, height=72):
    return encoded(photograph(number, width, height), quality=88)


def good(number, **members):
    """Sample `number`: every third has an id, images are of four sizes."""
    width, height = [(96, 72), (72, 96), (90, 90), (120, 60)][number % 4]
    content = {"jpg": jpeg(number, width, height), "txt": f"caption {number}".encode()}
    if number % 3 == 0:
        content["id"] = str(number // 6).encode()
    return Sample(f"{number:06d}", content | members)


def write(folder, count, per_shard=20, sample=good):
    """`count` samples in shards `00000.tar` ...; returns their pattern."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard, first in enumerate(range(0, count, per_shard)):
        numbers = range(first, min(count, first + per_shard))
        write_shard(folder / f"{shard:05d}.tar", [sample(n) for n in numbers])
    return str(folder / "*.tar")


def broken(number):
    """A broken sample, of one of six kinds."""
    whole = jpeg(number)
    damaged = [
        {"jpg": whole[: len(whole) // 2]},  # truncated
        {"jpg": b""},
        {"jpg": bytes(range(256)) * 4},  # garbage
        {"txt": b" \n"},  # empty caption
        {"txt": b"caf\xe9"},  # not UTF-8
        None,  # no image at all
    ][number % 6]
    sample = good(number)
    if damaged is None:
        return Sample(sample.key, {"txt": sample.members["txt"]})
    return Sample(sample.key, sample.members | damaged)
