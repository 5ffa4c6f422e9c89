"""8-bit RGB from images of every mode: the values, and the same in every backend."""

import io

import numpy as np
import pytest
import torch
from fastvlp_tests import photo_shards
from PIL import Image

from fastvlp.data import Loader, RgbConversion, class_folders
from fastvlp.data.images import base as image_backends
from fastvlp.data.images.base import BrokenImages
from fastvlp.data.images.integrity import MOST_PIXELS, ImageFault, decode_rgb
from fastvlp.data.images.recipes import recipe
from fastvlp.data.images.transforms import into_batch, into_batch_by_pillow, value_table
from fastvlp.data.shards.write import Sample, write_shard

CPU = torch.device("cpu")
RAMP = np.linspace(0, 1, 4096).reshape(64, 64)


def stored(image, kind, **options):
    return photo_shards.encoded(image, kind, **options)


def grey(content, **options):
    """The one channel of an image whose channels are equal."""
    pixels = decode_rgb(content, RgbConversion(**options))
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_greys_are_divided_by_257(kind):
    values = np.rint(RAMP * 65535).astype(np.uint16)
    found = grey(stored(Image.fromarray(values), kind))
    assert np.array_equal(found, np.rint(values / 257).astype(np.uint8))


def test_big_endian_sixteen_bit_greys():
    image = Image.frombytes("I;16B", (3, 1), np.array([0, 257, 65535], ">u2").tobytes())
    assert grey(stored(image, "TIFF")).tolist() == [[0, 1, 255]]


@pytest.mark.parametrize(
    "values, expected",
    [
        ([0.0, 0.2, 1.0], [0, 51, 255]),
        ([0.0, 0.2, 0.4], [0, 51, 102]),  # a dark image stays dark
        ([-3.0, 0.0, 12.0], [0, 51, 255]),
        ([np.nan, 10.0, 20.0], [0, 0, 255]),
        ([-np.inf, 5.0, np.inf], [0, 0, 255]),
        ([-3e38, 0.0, 3e38], [0, 128, 255]),
        ([7.0, 7.0, 7.0], [0, 0, 0]),
    ],
)
def test_floats_are_mapped_by_their_range(values, expected):
    image = Image.fromarray(np.array([values], np.float32))
    found = grey(stored(image, "TIFF"))[0].tolist()
    assert found == expected


def test_integers_of_32_bits_are_stretched():
    image = Image.fromarray(np.array([[-1000, 0, 4000]], np.int32))
    assert grey(stored(image, "TIFF")).tolist() == [[0, 51, 255]]


def test_transparency_is_composited_onto_the_background():
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0, :, 3] = 0, 51, 255  # black that is clear, a fifth and whole
    content = stored(Image.fromarray(pixels), "PNG")
    assert grey(content).tolist() == [[255, 204, 0]]
    assert grey(content, background="black").tolist() == [[0, 0, 0]]
    red = decode_rgb(content, RgbConversion(background=(255, 0, 0)))
    assert red.tolist() == [[[255, 0, 0], [204, 0, 0], [0, 0, 0]]]


def test_a_transparent_colour_of_any_mode_becomes_the_background():
    levels = Image.fromarray(np.array([[9, 7]], np.uint8))
    palette = Image.new("P", (2, 1))
    palette.putpalette([9, 9, 9, 7, 7, 7])
    palette.putdata([0, 1])
    deep = Image.fromarray(np.array([[9 * 257, 7]], np.uint16))
    colour = Image.merge("RGB", [levels] * 3)
    for image, clear, kind in (
        (levels, 7, "PNG"), (palette, 1, "PNG"), (palette, 1, "GIF"), (deep, 7, "PNG"),
        (colour, (7, 7, 7), "PNG"), (palette, bytes([255, 0]), "PNG"),
    ):  # fmt: skip
        content = stored(image, kind, transparency=clear)
        assert grey(content).tolist() == [[9, 255]], (image.mode, kind)


def test_opaque_images_are_as_pillow_converts_them():
    photograph = photo_shards.photograph(1)
    for mode in ("L", "LA", "P", "RGBA", "1", "RGB"):
        image = photograph.convert(mode)
        found = decode_rgb(stored(image, "PNG"))
        assert np.array_equal(found, np.array(image.convert("RGB"))), mode


def test_pillows_conversion_is_an_option():
    images = [
        (Image.fromarray(np.rint(RAMP * 65535).astype(np.uint16)), "PNG"),
        (Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
        (Image.new("RGBA", (4, 4), (1, 2, 3, 0)), "PNG"),
    ]
    for image, kind in images:
        content = stored(image, kind)
        pillow = np.array(Image.open(io.BytesIO(content)).convert("RGB"))
        assert np.array_equal(decode_rgb(content, RgbConversion(method="pillow")), pillow)
        assert not np.array_equal(decode_rgb(content), pillow)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"background": "whitish"}, "background: expected a colour .* got 'whitish'"),
        ({"background": (0, 0)}, "background"),
        ({"background": (0, 0, 256)}, "background"),
        ({"background": None}, "background"),
        ({"method": "clip"}, "method: expected 'range' or 'pillow', got 'clip'"),
    ],
)
def test_wrong_conversions_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RgbConversion(**options)


def test_every_backend_converts_alike(tmp_path):
    clear = photo_shards.photograph(2).convert("RGBA")
    clear.putalpha(Image.fromarray(np.rint(RAMP * 255).astype(np.uint8)).resize(clear.size))
    contents = {
        "png": stored(clear, "PNG"),
        "tif": stored(Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
        "jpg": photo_shards.jpeg(0),
    }
    samples = [Sample(str(i), {k: c, "txt": b"a"}) for i, (k, c) in enumerate(contents.items())]
    write_shard(tmp_path / "a.tar", samples)

    def pixels(backend, **options):
        loader = Loader(
            tmp_path, "clip_eval", 3, backend=backend, device="cpu", threads=1,
            cache_dir=tmp_path / "cache", convert=RgbConversion(**options),
        )  # fmt: skip
        (batch,) = loader
        loader.close()
        return batch.images

    for options in ({}, {"background": "red"}, {"method": "pillow"}):
        assert torch.equal(pixels("pil", **options), pixels("dali", **options))
    of = recipe("clip_eval")
    from fastvlp.data.images.dali import DaliGpuBackend

    exact = pixels("pil", background="red")
    whole = DaliGpuBackend(of, 3, 1, CPU, RgbConversion(background="red"))
    images = whole.decode(list(contents.values()))
    found, _ = whole.batch(images, lambda i, width, height: of.plan(width, height, ()))
    whole.close()
    assert (found - exact).abs().mean() < 0.02
    assert (pixels("pil") - exact)[0].abs().mean() > 0.2


# --- images of extreme size -----------------------------------------------------------------------


def test_images_of_too_many_pixels_are_faults_before_they_are_decoded(monkeypatch):
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("was decoded"))
    side = 1 + int(MOST_PIXELS**0.5)
    bomb = stored(Image.new("1", (side, side)), "PNG")
    with pytest.raises(ImageFault, match="178,?956,?970"):
        decode_rgb(bomb)


@pytest.mark.parametrize("backend", ["pil", "dali"])
def test_a_strip_that_grows_too_large_costs_only_itself(tmp_path, backend):
    strip = stored(Image.new("RGB", (60_000, 1)), "PNG")
    samples = [Sample("a", {"png": strip, "txt": b"strip"})]
    samples += [Sample(str(i), {"jpg": photo_shards.jpeg(i), "txt": b"a"}) for i in range(3)]
    write_shard(tmp_path / "a.tar", samples)
    loader = Loader(
        tmp_path, "clip_eval", 4, backend=backend, device="cpu", threads=1,
        cache_dir=tmp_path / "cache", max_broken=0.5,
    )  # fmt: skip
    (batch,) = loader
    loader.close()
    assert batch.captions == ["a"] * 3
    assert loader.skipped == {"image": 1}
    assert "60000 x 1 pixels would be resized to 13440000 x 224" in str(loader.faults[0])


def test_the_gpu_backend_refuses_strips_before_it_runs():
    from fastvlp.data.images.dali import DaliGpuBackend

    of = recipe("clip_eval")
    backend = DaliGpuBackend(of, 2, 1, CPU, RgbConversion())
    images = backend.decode([stored(Image.new("RGB", (1, 60_000)), "PNG"), photo_shards.jpeg(1)])
    with pytest.raises(BrokenImages) as broken:
        backend.batch(images, lambda i, width, height: of.plan(width, height, ()))
    backend.close()
    assert list(broken.value.faults) == [0]


@pytest.mark.parametrize("size", [(1300, 1), (2, 1777)])
def test_long_images_within_the_bound_are_read(size):
    of = recipe("clip_eval")
    pixels = np.random.default_rng(size[0]).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    plans = image_backends.plans_of([size], lambda _, w, h: of.plan(w, h, ()))
    outs = [torch.empty(1, 3, 224, 224) for _ in range(2)]
    into_batch_by_pillow([Image.fromarray(pixels)], plans, value_table(of), outs[0])
    into_batch([pixels], plans, value_table(of), outs[1])
    assert torch.equal(*outs)


def test_a_folder_of_classes_leaves_out_what_cannot_be_decoded(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    paths[0].write_bytes(photo_shards.jpeg(0))
    paths[1].write_bytes(stored(Image.new("RGB", (60_000, 1)), "PNG"))
    paths[2].write_bytes(stored(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), "PNG"))
    labelled = [(path, i) for i, path in enumerate(paths)]
    means = lambda images: images.mean((2, 3))  # noqa: E731
    with pytest.warns(UserWarning, match=r"1 of 3 left out.*1\.png: the image of 60000 x 1"):
        features, labels = class_folders.encode(labelled, means, 64, 2, CPU)
    assert labels.tolist() == [0, 2]
    assert (features[1] > 0).all()  # white, not the black under the alpha
