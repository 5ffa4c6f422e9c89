"""Which patches an image has, which are kept, and where the model thinks they are."""

import pytest
import torch
import torch.nn.functional as F
from fastvlp_tests.vilt_cases import PATCH, SIZES, images, mask_of
from hypothesis import given
from hypothesis import strategies as st

from fastvlp.models.vilt import patches as vilt_patches
from fastvlp.models.vilt.patches import ImageBatch, PatchGrid, position_weights, select


def kept_places(selection):
    """For each image, the set of (row, column) of its patches."""
    columns = selection.grid.valid.shape[2]
    image, place = selection.packed()
    return [
        {(p // columns, p % columns) for p in place[image == i].tolist()}
        for i in range(len(selection.counts))
    ]


def test_sizes_masks_and_full_canvases_agree():
    batch = images()
    grid = PatchGrid.make(batch, PATCH)
    assert grid.counts == tuple(h * w for h, w in SIZES)
    for other in (
        batch._replace(sizes=None, pixel_mask=mask_of(batch)),
        batch._replace(sizes=None, pixel_mask=mask_of(batch).int()),
        batch._replace(sizes=torch.tensor(SIZES)),
    ):
        made = PatchGrid.make(other, PATCH)
        assert made.counts == grid.counts
        assert all(torch.equal(getattr(made, k), getattr(grid, k))
                   for k in ("valid", "heights", "widths"))  # fmt: skip
    full = PatchGrid.make(ImageBatch(batch.images), PATCH)
    assert full.counts == (20,) * 4 and full.valid.all()


def test_zero_detection_takes_black_pixels_for_padding():
    batch = images([(2, 2)])
    assert vilt_patches.nonzero_pixels(batch.images).all()
    batch.images[0, :, 0, PATCH] = torch.tensor([0.5, 0.5, -1.0])
    mask = vilt_patches.nonzero_pixels(batch.images)
    assert mask.sum() == mask.numel() - 1
    grid = PatchGrid.make(ImageBatch(batch.images, mask), PATCH)
    assert (grid.counts, grid.heights.item(), grid.widths.item()) == ((3,), 2, 1)


@given(
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4),
    side=st.integers(1, 6),
    double=st.booleans(),
)
def test_positions_are_the_bilinear_resize_with_aligned_corners(sizes, side, double):
    dtype = torch.float64 if double else torch.float32
    grid = PatchGrid.make(images(sizes), PATCH)
    image, place = select(grid).packed()
    positions = torch.randn(side, side, 5, dtype=torch.float64)
    weights = position_weights(grid, image, place, side, dtype)
    assert weights.dtype == dtype
    got = weights.double() @ positions.flatten(0, 1)
    expected = [
        F.interpolate(positions.permute(2, 0, 1)[None], size, mode="bilinear", align_corners=True)
        for size in sizes
    ]
    expected = torch.cat([e[0].permute(1, 2, 0).flatten(0, 1) for e in expected])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12 if double else 2e-5)


def test_the_models_own_grid_takes_its_positions_unchanged():
    grid = PatchGrid.make(images([(4, 4)]), PATCH)
    image, place = select(grid).packed()
    weights = position_weights(grid, image, place, 4, torch.float32)
    assert torch.equal(weights, torch.eye(16))


def test_beyond_height_and_width_of_a_ragged_mask_there_is_no_position():
    mask = torch.ones(1, 2 * PATCH, 3 * PATCH)
    mask[0, 0, 2 * PATCH] = 0  # the first row is two patches wide, the second three
    grid = PatchGrid.make(ImageBatch(torch.randn(1, 3, 16, 24), mask), PATCH)
    image, place = select(grid).packed()
    assert place.tolist() == [0, 1, 3, 4, 5]
    sums = position_weights(grid, image, place, 4, torch.float32).sum(1)
    assert sums.tolist() == [1, 1, 1, 1, 0]


def test_all_patches_are_kept_below_the_limit_and_as_many_as_it_above():
    grid = PatchGrid.make(images(), PATCH)
    everything = [{(r, c) for r in range(h) for c in range(w)} for h, w in SIZES]
    assert kept_places(select(grid)) == kept_places(select(grid, -1)) == everything
    assert kept_places(select(grid, 16)) == everything
    selection = select(grid, 6, seed=5)
    assert selection.counts == (6, 6, 2, 6)
    kept = kept_places(selection)
    assert [len(k) for k in kept] == [6, 6, 2, 6]
    assert all(k <= e for k, e in zip(kept, everything, strict=True))
    image, place, real = selection.padded()
    assert real.sum(1).tolist() == [6, 6, 2, 6]
    assert torch.equal(place[real], selection.packed()[1])
    assert torch.equal(image[real], selection.packed()[0])


def test_a_subset_is_a_function_of_seed_and_sample():
    """Not of the canvas, the other images or the place in the batch."""
    batch = images()._replace(sample_index=[4, 1 << 40, 9, 2])
    grid = PatchGrid.make(batch, PATCH)
    kept = kept_places(select(grid, 6, 5, batch.sample_index))
    assert kept_places(select(grid, 6, 5, torch.tensor(batch.sample_index))) == kept
    assert kept_places(select(grid, 6, 6, batch.sample_index)) != kept
    alone = ImageBatch(batch.images[1:2, :, : 4 * PATCH, : 4 * PATCH])
    alone_grid = PatchGrid.make(alone, PATCH)
    assert kept_places(select(alone_grid, 6, 5, [1 << 40])) == kept[1:2]
    assert kept_places(select(alone_grid, 6, 5, [1])) != kept[1:2]
    taken = batch.take(torch.tensor([3, 1]))
    again = select(PatchGrid.make(taken, PATCH), 6, 5, taken.sample_index)
    assert kept_places(again) == [kept[3], kept[1]]
    assert torch.equal(taken.images, batch.images[[3, 1]])


def test_without_a_seed_torchs_generator_decides():
    grid = PatchGrid.make(images(), PATCH)
    torch.manual_seed(3)
    first, second = (kept_places(select(grid, 6)) for _ in range(2))
    torch.manual_seed(3)
    assert kept_places(select(grid, 6)) == first != second


def test_subsets_are_uniform():
    """Each patch, and each pair of patches, is kept as often as a fair draw keeps it."""
    n, cap, patches = 6000, 5, 12
    grid = PatchGrid.make(ImageBatch(torch.zeros(n, 3, 3 * PATCH, 4 * PATCH)), PATCH)
    image, place = select(grid, cap, seed=11).packed()
    kept = torch.zeros(n, patches).index_put((image, place), torch.ones(len(image)))
    assert (kept.sum(1) == cap).all()
    together = kept.T @ kept / n
    single, pair = cap / patches, cap * (cap - 1) / (patches * (patches - 1))
    expected = torch.full((patches, patches), pair).fill_diagonal_(single)
    deviations = (together - expected) / (expected * (1 - expected) / n).sqrt()
    assert deviations.abs().max() < 4.5


@pytest.mark.parametrize(
    "change, name",
    [
        (dict(images=torch.zeros(4, 3, 32, 40, dtype=torch.uint8)), "images"),
        (dict(images=torch.zeros(4, 32, 40)), "images"),
        (dict(images=torch.zeros(4, 3, 32, 41)), "images"),
        (dict(pixel_mask=torch.ones(4, 32, 40)), "sizes"),
        (dict(sizes=None, pixel_mask=torch.ones(4, 32, 41)), "pixel_mask"),
        (dict(sizes=None, pixel_mask=torch.zeros(4, 32, 40)), "pixel_mask"),
        (dict(sizes=[(1, 1)]), "sizes"),
        (dict(sizes=[(1, 1), (0, 2), (1, 1), (1, 1)]), "sizes"),
        (dict(sizes=[(1, 1), (4, 6), (1, 1), (1, 1)]), "sizes"),
    ],
)
def test_bad_images(change, name):
    with pytest.raises((TypeError, ValueError), match=f"^{name}: "):
        PatchGrid.make(images()._replace(**change), PATCH)


def test_bad_selections():
    grid = PatchGrid.make(images(), PATCH)
    with pytest.raises(ValueError, match="^max_image_len: "):
        select(grid, 0)
    with pytest.raises(ValueError, match="^sample_index: "):
        select(grid, 6, 1, [1, 2])
