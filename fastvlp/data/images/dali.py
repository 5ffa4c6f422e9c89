"""DALI's part: decoding on the CPU, and decoding, resizing and normalising on a GPU.

On the CPU DALI only decodes, in about half of Pillow's time and with the same pixels; its own
bicubic resize costs several times what the compiled kernel takes. On a GPU all of it is DALI's,
except for recipes with RandAugment, whose images are made on the CPU and copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types
import torch
from nvidia.dali import Pipeline

from fastvlp.data.images.base import BrokenImages, KernelBackend, Planner, Threaded, plans_of
from fastvlp.data.images.conversion import RgbConversion
from fastvlp.data.images.integrity import ImageFault, decode_rgb, jpeg_header
from fastvlp.data.images.recipes import Plan, Recipe
from fastvlp.data.images.transforms import canvas, pixel_mask


def backend(
    recipe: Recipe, batch_size: int, threads: int, device: torch.device, convert: RgbConversion
):
    """The backend for a recipe on a device."""
    on_gpu = device.type == "cuda" and not getattr(recipe, "augment", None)
    kind = DaliGpuBackend if on_gpu else DaliBackend
    return kind(recipe, batch_size, threads, device, convert)


class _WithPipeline(Threaded):
    """A backend with a pipeline of DALI's for at most ``batch_size`` images."""

    name = "dali"

    def __init__(
        self,
        recipe: Recipe,
        batch_size: int,
        threads: int,
        device: torch.device,
        convert: RgbConversion,
    ) -> None:
        super().__init__(recipe, threads, device, convert)
        self._batch_size = batch_size
        self._pipeline = self._built()


def _decoder(batch_size: int, threads: int) -> Pipeline:
    # Dynamic execution: an output lives as long as someone holds it.
    pipeline = Pipeline(batch_size, threads, None, exec_dynamic=True, prefetch_queue_depth=1)
    with pipeline:
        encoded = fn.external_source(name="encoded")
        # Pillow leaves it to its callers to turn images as their camera was held, and the systems
        # do not.
        pixels = fn.decoders.image(encoded, output_type=types.RGB, adjust_orientation=False)
        pipeline.set_outputs(pixels)
    pipeline.build()
    return pipeline


class DaliBackend(_WithPipeline, KernelBackend):
    """Plain JPEGs decoded by DALI, all other images by Pillow; the rest by the compiled kernel."""

    def _built(self) -> Pipeline:
        return _decoder(self._batch_size, self._threads)

    def decode(self, contents: Sequence[bytes]) -> list[Any]:
        plain, others = _divided(contents)
        images: list[Any] = [None] * len(contents)
        decoded = super().decode([contents[i] for i in others])
        for i, image in zip(others, decoded, strict=True):
            images[i] = image
        for i, image in zip(plain, self._decode_plain([contents[i] for i in plain]), strict=True):
            images[i] = image
        return images

    def _decode_plain(self, contents: list[bytes]) -> list[Any]:
        if not contents:
            return []
        try:
            self._pipeline.feed_input("encoded", [np.frombuffer(c, np.uint8) for c in contents])
            (images,) = self._pipeline.run()
            return [np.asarray(images[i]) for i in range(len(images))]
        except RuntimeError:
            # One image that fails takes the batch with it. Pillow says which, and a new pipeline
            # knows nothing of it.
            self._pipeline = self._built()
            return super().decode(contents)


def _divided(contents: Sequence[bytes]) -> tuple[list[int], list[int]]:
    headers = [jpeg_header(content) for content in contents]
    plain = [i for i, header in enumerate(headers) if header and header.plain]
    return plain, [i for i, header in enumerate(headers) if not (header and header.plain)]


class DaliGpuBackend(_WithPipeline):
    """All by DALI: decoding ("mixed" on a GPU), crop, resize, window, flip, normalisation.

    ``device`` may be the CPU, where it gives the same as on a GPU but for the decoder.
    """

    def decode(self, contents: Sequence[bytes]) -> list[Any]:
        # Decoded together with the transform; here only what no decoder of DALI's is trusted with
        # is decoded, by Pillow, and handed over losslessly.
        images: list[Any] = list(contents)
        others = _divided(contents)[1]
        decoded = self._decoded(decode_rgb, [contents[i] for i in others])
        for i, image in zip(others, decoded, strict=True):
            images[i] = _bitmap(image) if isinstance(image, np.ndarray) else image
        return images

    def batch(self, images: Sequence[bytes], plan: Planner):
        try:
            return self._batch(images, plan)
        except RuntimeError:
            # One image that fails takes the batch with it; Pillow says which.
            self._pipeline = self._built()
            found = self._decoded(decode_rgb, images)
            faults = {i: e for i, e in enumerate(found) if isinstance(e, ImageFault)}
            if not faults:
                raise
            raise BrokenImages(faults) from None

    def _batch(self, images: Sequence[bytes], plan: Planner):
        plans = plans_of([_size(image) for image in images], plan)
        height, width = canvas(plans, self._recipe)
        out = torch.zeros(len(plans), 3, height, width, device=self._device)
        if plans:
            for place, pixels in zip(out, self._run(images, plans), strict=True):
                place[:, : pixels.shape[1], : pixels.shape[2]] = pixels
        mask = pixel_mask(plans, height, width).to(self._device) if self._recipe.padded else None
        return out, mask

    def _run(self, images: Sequence[bytes], plans: Sequence[Plan]) -> list[torch.Tensor]:
        feed = {"encoded": [np.frombuffer(image, np.uint8) for image in images]}
        crops, sizes, windows = (
            np.array([getattr(p, name) for p in plans], np.float32)
            for name in ("crop", "size", "window")
        )
        # DALI's order is height before width.
        feed["start"], feed["end"] = (
            list(crops[:, 1::-1]),
            list((crops[:, :2] + crops[:, 2:])[:, ::-1]),
        )
        feed["size"] = list(np.ascontiguousarray(sizes[:, ::-1]))
        feed["anchor"], feed["shape"] = (
            list(windows[:, 1::-1].astype(np.int32)),
            list(windows[:, :1:-1].astype(np.int32)),
        )
        feed["flip"] = [np.array(p.flip, np.int32) for p in plans]
        for name, values in feed.items():
            values = [np.ascontiguousarray(value) for value in values]
            self._pipeline.feed_input(name, values)
        (pixels,) = self._pipeline.run()
        return [torch.from_dlpack(pixels[i]) for i in range(len(pixels))]

    def _built(self) -> Pipeline:
        gpu = self._device.type == "cuda"
        device_id = self._device.index if gpu else None
        mean, std = ([255 * v for v in values] for values in (self._recipe.mean, self._recipe.std))
        pipeline = Pipeline(
            self._batch_size, self._threads, device_id, exec_dynamic=True, prefetch_queue_depth=1
        )
        with pipeline:
            names = ("encoded", "start", "end", "size", "anchor", "shape", "flip")
            given = {name: fn.external_source(name=name) for name in names}
            pixels = fn.decoders.image(
                given["encoded"],
                device="mixed" if gpu else "cpu",
                output_type=types.RGB,
                adjust_orientation=False,
            )
            pixels = fn.resize(
                pixels,
                size=given["size"],
                roi_start=given["start"],
                roi_end=given["end"],
                interp_type=types.INTERP_CUBIC,
                antialias=True,
            )
            pixels = fn.slice(pixels, given["anchor"], given["shape"], axes=[0, 1])
            pixels = fn.crop_mirror_normalize(
                pixels, mirror=given["flip"], mean=mean, std=std, output_layout="CHW"
            )
            pipeline.set_outputs(pixels)
        pipeline.build()
        return pipeline


def _size(image: bytes) -> tuple[int, int]:
    header = jpeg_header(image)
    if header:
        return header.width, header.height
    return int.from_bytes(image[18:22], "little"), -int.from_bytes(
        image[22:26], "little", signed=True
    )


def _bitmap(pixels: np.ndarray) -> bytes:
    """An uncompressed Windows bitmap, rows from top to bottom."""
    height, width = pixels.shape[:2]
    rows = np.zeros((height, -(-3 * width // 4) * 4), np.uint8)
    rows[:, : 3 * width] = pixels[:, :, ::-1].reshape(height, 3 * width)
    header = np.array(
        [54 + rows.size, 0, 54, 40, width, -height, 1 | 24 << 16, 0, rows.size], "<i4"
    )
    return b"BM" + header.tobytes() + bytes(54 - 2 - header.nbytes) + rows.tobytes()
