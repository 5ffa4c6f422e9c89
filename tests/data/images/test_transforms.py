"""Recipes: what they plan, and that the compiled kernel and Pillow give the same bits."""

import numpy as np
import pytest
import torch
import torchvision.transforms as tv
from fastvlp_tests import photo_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastvlp.data.images.randaugment import AlbefRandAugment, ViltRandAugment
from fastvlp.data.images.recipes import CLIP_MEAN, CLIP_STD, RECIPES, KeepAspect, Plan, recipe
from fastvlp.data.images.transforms import (
    canvas,
    into_batch,
    into_batch_by_pillow,
    pixel_mask,
    transformed,
    value_table,
)
from fastvlp.ops import compiled

assert not compiled.load(), compiled.load()
# All that this CPU has.
ISAS = torch.ops.fastvlp.cpu_instruction_sets().split(",")
SIZES = [(96, 72), (72, 96), (33, 200), (250, 190), (17, 19)]


def both(plans, images, of):
    """The batch by Pillow and by the kernel."""
    height, width = canvas(plans, of)
    table = value_table(of)
    outs = [torch.empty(len(plans), 3, height, width) for _ in range(2)]
    into_batch_by_pillow(images, plans, table, outs[0])
    into_batch([np.array(image) for image in images], plans, table, outs[1])
    return outs


def augmented_plan(size, *operations):
    return Plan((), (0, 0, *size), size, (0, 0, *size), False, operations)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", RECIPES)
def test_kernel_and_pillow_give_the_same_bits(name, isa, monkeypatch):
    monkeypatch.setenv("FASTVLP_CPU_ISA", isa)
    generator = np.random.default_rng(3)
    of = recipe(name)
    images = [photo_shards.photograph(i, *size) for i, size in enumerate(SIZES)]
    plans = [of.plan(*image.size, generator.random(of.uses)) for image in images]
    by_pillow, by_kernel = both(plans, images, of)
    assert torch.equal(by_pillow, by_kernel)
    assert by_kernel.std() > 0.2


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=40)
@given(data=st.data())
def test_any_crop_size_and_window(isa, data):
    def below(n, least=1):
        return data.draw(st.integers(least, n))

    width, height = below(60), below(60)
    crop_size = below(width), below(height)
    size = below(70), below(70)
    window_size = below(size[0]), below(size[1])
    plan = Plan(
        (),
        (below(width - crop_size[0], 0), below(height - crop_size[1], 0), *crop_size),
        size,
        (below(size[0] - window_size[0], 0), below(size[1] - window_size[1], 0), *window_size),
        data.draw(st.booleans()),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTVLP_CPU_ISA", isa)
        image = photo_shards.photograph(data.draw(st.integers(0, 50)), width, height)
        by_pillow, by_kernel = both([plan], [image], RECIPES["clip_eval"])
    assert torch.equal(by_pillow, by_kernel)


MAGNITUDES = {ViltRandAugment: (0.0, 9.0, 30.0), AlbefRandAugment: (2.0, 7.0, 10.0)}
AUGMENTS = [
    (augment, name, magnitude)
    for augment, magnitudes in MAGNITUDES.items()
    for name in augment.names
    if name != "Identity"
    for magnitude in magnitudes
]  # fmt: skip


@pytest.mark.parametrize(
    "augment, name, magnitude", AUGMENTS, ids=[f"{a.__name__}-{n}-{m:g}" for a, n, m in AUGMENTS]
)
def test_each_operation_has_pillows_bits(augment, name, magnitude):
    images = [photo_shards.photograph(5, *size) for size in SIZES]
    images += [Image.new("RGB", (9, 7), color) for color in ("black", "red", "white")]
    images += [Image.new("RGB", (w, h), (200, 3, 90)) for w, h in ((1, 1), (2, 5), (5, 2))]
    of = augment(magnitude=magnitude)
    plans = [
        augmented_plan(image.size, of.operation(name, *image.size, negative))
        for negative in (False, True)
        for image in images
    ]
    by_pillow, by_kernel = both(plans, images * 2, RECIPES["clip_eval"])
    assert torch.equal(by_pillow, by_kernel)


def test_clip_evaluation_is_torchvisions_on_pillow_images():
    reference = tv.Compose(
        [
            tv.Resize(224, tv.InterpolationMode.BICUBIC),
            tv.CenterCrop(224),
            tv.ToTensor(),
            tv.Normalize(CLIP_MEAN, CLIP_STD),
        ]
    )
    of = recipe("clip_eval")
    for number, size in enumerate([(500, 375), (375, 500), (224, 224), (301, 640), (225, 224)]):
        image = photo_shards.photograph(number, *(min(s, 420) for s in size))
        plan = of.plan(*image.size, [])
        for out in both([plan], [image], of):
            assert torch.equal(out[0], reference(image))


def test_albef_evaluation_is_torchvisions_on_pillow_images():
    reference = tv.Compose(
        [
            tv.Resize((384, 384), tv.InterpolationMode.BICUBIC),
            tv.ToTensor(),
            tv.Normalize(CLIP_MEAN, CLIP_STD),
        ]
    )
    image, of = photo_shards.photograph(2, 400, 300), recipe("albef_eval")
    assert torch.equal(both([of.plan(400, 300, [])], [image], of)[1][0], reference(image))


def test_random_crops_are_drawn_as_torchvision_draws_them():
    of = recipe("albef_pretrain")
    reference = tv.RandomResizedCrop(256, (0.2, 1.0))
    image = Image.new("RGB", (500, 375))
    generator = np.random.default_rng(0)
    torch.manual_seed(0)
    mine = np.array([of.plan(500, 375, row).crop for row in generator.random((4000, of.uses))])
    theirs = np.array(
        [reference.get_params(image, (0.2, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)]
    )
    theirs = theirs[:, [1, 0, 3, 2]]
    for column in range(4):
        for quantile in (0.1, 0.5, 0.9):
            a, b = (np.quantile(each[:, column], quantile) for each in (mine, theirs))
            assert abs(a - b) < 12
    assert (mine[:, 0] + mine[:, 2] <= 500).all() and (mine[:, 1] + mine[:, 3] <= 375).all()


@pytest.mark.parametrize("width, height", [(1000, 20), (20, 1000)])
def test_long_images_fall_back_to_their_middle(width, height):
    of = recipe("clip_train")
    left, top, w, h = of.plan(width, height, np.full(of.uses, 0.5)).crop
    assert (left, top) == ((width - w) // 2, (height - h) // 2)
    # Sides are whole pixels.
    assert 0.74 <= w / h <= 1.35


def test_flips_and_draws():
    of = recipe("albef_pretrain")
    generator = np.random.default_rng(0)
    plans = [of.plan(300, 200, row) for row in generator.random((4000, of.uses))]
    assert abs(np.mean([plan.flip for plan in plans]) - 0.5) < 0.03
    # Two draws of ten, of which one does nothing, each carried out with probability 1/2.
    assert abs(np.mean([len(plan.after) for plan in plans]) - 0.9) < 0.05
    assert not any(
        RECIPES["clip_train"].plan(300, 200, row).flip for row in generator.random((99, 23))
    )
    vilt = recipe("vilt_finetune")
    plans = [vilt.plan(300, 200, row) for row in generator.random((2000, vilt.uses))]
    assert {len(plan.before) for plan in plans} == {2}
    kinds = {operation.kind for plan in plans for operation in plan.before}
    assert len(kinds) == 10  # five of geometry are one kind


def test_magnitudes_are_the_papers():
    vilt, albef = ViltRandAugment(), AlbefRandAugment()
    assert vilt.operation("Posterize", 9, 9, False).values == (1.0,)
    assert vilt.operation("Solarize", 9, 9, False).values[0] == pytest.approx(76.8)
    assert vilt.operation("Color", 9, 9, False).values[0] == pytest.approx(0.64)
    assert vilt.operation("TranslateX", 9, 9, True).values[2] == pytest.approx(-30)
    assert vilt.operation("ShearY", 9, 9, False).values[3] == pytest.approx(0.09)
    assert albef.operation("Brightness", 9, 9, False).values[0] == pytest.approx(1.36)
    assert albef.operation("ShearX", 9, 9, False).values[1] == pytest.approx(0.21)
    assert albef.operation("TranslateY", 9, 9, True).values[5] == pytest.approx(-7)


@pytest.mark.parametrize(
    "size, expected",
    [
        ((500, 375), (512, 384)),
        ((640, 480), (512, 384)),
        ((1000, 500), (608, 320)),  # 639 x 319.5, rounded and cut to multiples of 32
        ((384, 384), (384, 384)),
        ((5000, 100), (608, 32)),
    ],
)
def test_vilt_keeps_the_aspect(size, expected):
    assert KeepAspect().plan(*size, []).size == expected
    assert KeepAspect().plan(*size[::-1], []).size == expected[::-1]


def test_padding_is_zero_and_masked():
    of = recipe("vilt_eval", shorter=64, longer=106)
    images = [photo_shards.photograph(1, 96, 72), photo_shards.photograph(2, 72, 96)]
    plans = [of.plan(*image.size, []) for image in images]
    out = both(plans, images, of)[1]
    mask = pixel_mask(plans, *canvas(plans, of))
    assert mask.sum((1, 2)).tolist() == [plan.size[0] * plan.size[1] for plan in plans]
    assert (out[~mask[:, None].expand_as(out)] == 0).all()
    for one, plan, image in zip(out, plans, images, strict=True):
        pixels = torch.from_numpy(np.array(transformed(image, plan))).permute(2, 0, 1)
        found = one[:, : plan.size[1], : plan.size[0]]
        torch.testing.assert_close(found, pixels / 127.5 - 1)


def test_a_changed_recipe_and_wrong_names():
    assert recipe("clip_train", scale=(0.08, 1.0)).scale == (0.08, 1.0)
    with pytest.raises(ValueError, match="clip_train.*got 'clip'"):
        recipe("clip")
    with pytest.raises(ValueError, match="no parameter 'sise'"):
        recipe("clip_eval", sise=2)


def test_the_kernel_refuses_plans_that_do_not_fit():
    image = np.zeros((4, 5, 3), np.uint8)
    table = value_table(RECIPES["clip_eval"])
    whole = (0, 0, 5, 4)
    for crop, size, window in (
        ((1, 0, 5, 4), (5, 4), whole),
        ((0, 0, 0, 4), (5, 4), whole),
        (whole, (4, 4), whole),
        (whole, (9, 9), (0, 0, 9, 9)),
        ((-1, 0, 3, 3), (5, 4), whole),
    ):
        with pytest.raises(RuntimeError, match="row 0 has a box"):
            into_batch([image], [Plan((), crop, size, window)], table, torch.empty(1, 3, 4, 5))
    with pytest.raises(RuntimeError, match="images: expected"):
        into_batch([image[:, ::2]], [Plan((), (0, 0, 3, 4), (3, 4), (0, 0, 3, 4))], table,
                   torch.empty(1, 3, 4, 5))  # fmt: skip
