"""The word-patch alignment kernels against the float64 reference: interpreted, or on a GPU."""

import math

import pytest
import torch
from fastvlp_tests.alignment_cases import (
    KINDS,
    pairs,
)
from fastvlp_tests.alignment_kernels import MODULE, check, check_lost_entries
from hypothesis import given, settings
from hypothesis import strategies as st

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("beta, iterations", [(0.1, 50), (0.1, 300), (0.04, 300)])
def test_entries_that_leave_the_range_of_float32_come_back(run_kernel, device, beta, iterations):
    check_lost_entries(run_kernel, device, beta, iterations)


@settings(max_examples=12)
@given(
    words=st.sampled_from([1, 3, 16, 17, 40]),
    patches=st.sampled_from([1, 16, 33, 100]),
    dim=st.sampled_from([1, 7, 32, 65]),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
    masks=st.sampled_from(["none", "lengths", "holes"]),
    strided=st.booleans(),
    seed=st.integers(0, 3),
)
def test_matches_float64(run_kernel, device, words, patches, dim, dtype, **drawn):
    check(run_kernel, pairs(2, words, patches, dim, dtype, device, **drawn))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_shape_of_vilt(run_kernel, device, dtype):
    check(run_kernel, pairs(2, 40, 200, 96, dtype, device))


@pytest.mark.parametrize("inner", [1, 3])
@pytest.mark.parametrize("beta, iterations", [(0.05, 30), (2.0, 4)])
def test_every_setting(run_kernel, device, beta, iterations, inner):
    case = pairs(2, 9, 33, 24, torch.float32, device, kind="matching")
    check(run_kernel, case, beta, iterations, inner)


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e12])
def test_extreme_features(run_kernel, device, scale):
    check(run_kernel, pairs(2, 9, 30, 40, torch.float32, device, scale=scale))


def test_empty_sides(run_kernel, device):
    case = pairs(3, 6, 11, 8, torch.float32, device, masks="none")
    case.text_padding[1], case.image_padding[2] = True, True
    distance, plan, dx, dy = check(run_kernel, case)
    assert distance[0] > 0 and not distance[1:].any() and not plan[1:].any()
    assert not dx[1:].any() and not dy[1:].any()
    for shape in ((0, 4, 5, 8), (2, 0, 5, 8), (2, 4, 0, 8)):
        check(run_kernel, pairs(*shape, torch.float32, device, masks="none"))


def test_nan_stays_in_its_pair(run_kernel, device):
    case = pairs(3, 6, 11, 8, torch.float32, device, masks="none")
    case.text[1, 2, 3] = math.nan
    distance, *_ = run_kernel(MODULE, "word_patch_alignment", case.text, case.image, *case.masks())
    assert distance.isnan().tolist() == [False, True, False]


def test_bitwise_deterministic(run_kernel, device):
    case = pairs(2, 20, 40, 32, torch.bfloat16, device)
    for first, second in zip(check(run_kernel, case), check(run_kernel, case), strict=True):
        assert torch.equal(first, second)


def test_too_long_a_pair_is_refused(run_kernel, device):
    case = pairs(1, 70, 200, 8, torch.float32, device, masks="none")
    with pytest.raises(ValueError, match="Triton alignment kernels cannot run: 70 words"):
        run_kernel(MODULE, "word_patch_alignment", case.text, case.image, *case.masks())
