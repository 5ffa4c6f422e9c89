"""The momentum-contrastive kernels against the float64 reference: interpreted, or on a GPU."""

import pytest
import torch
from fastvlp_tests.momentum_cases import check_fitted, draw
from fastvlp_tests.momentum_kernels import check
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlp.ops import momentum_contrastive

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@settings(max_examples=12)
@given(
    batch=st.sampled_from([1, 2, 31, 33, 40]),
    queue=st.sampled_from([0, 1, 33, 100]),
    dim=st.sampled_from([1, 16, 33, 64]),
    dtype=st.sampled_from(DTYPES),
    temperature=st.sampled_from([0.02, 0.07, 1.0]),
    alpha=st.sampled_from([0.0, 0.4, 1.0]),
    kinds=st.sampled_from([0, 1, 7, 200]),
    part=st.sampled_from([None, 0.0, 0.5]),
    strided=st.booleans(),
    seed=st.integers(0, 3),
)
def test_matches_float64(run_kernel, device, batch, queue, dim, dtype, part, seed, **drawn):
    length = None if part is None else int(queue * part)
    check(run_kernel, draw(batch, queue, dim, dtype, device, length=length, seed=seed, **drawn))


@pytest.mark.parametrize("dtype", DTYPES)
def test_wider_than_one_block(run_kernel, device, dtype):
    check(run_kernel, draw(9, 50, 300, dtype, device, kinds=4))


def test_without_a_teacher(run_kernel, device):
    check(run_kernel, draw(9, 50, 32, torch.float32, device, alpha=0.0), teacher=False)


def test_well_fitted_rows_keep_their_loss(run_kernel):
    def run(step):
        return run_kernel(
            "momentum_contrastive.losses",
            "momentum_contrastive",
            *step.arguments(),
            True,
            True,
            False,
        )

    check_fitted(run)


@pytest.mark.parametrize("temperature", [1e-36, 1e-12, 1e12, 1e36])
def test_extreme_temperatures(run_kernel, device, temperature):
    step = draw(5, 9, 3, torch.float32, device, temperature=temperature)
    loss = run_kernel(
        "momentum_contrastive.losses", "momentum_contrastive", *step.arguments(), True, True, False
    )[0]
    exact = step.run(momentum_contrastive, torch.float64)[0]
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)


def test_slices_of_several_blocks(run_kernel_with, device):
    step = draw(20, 700, 32, torch.float32, device, kinds=50)

    def in_few_slices(*args, **kwargs):
        return run_kernel_with({"SLICES": 2}, *args, **kwargs)

    check(in_few_slices, step)


def test_more_slices_than_are_merged_at_a_time(run_kernel_with, device):
    # Of rows of 1,024 elements the kernel that merges reads eight at a time.
    step = draw(5, 100, 520, torch.float32, device, kinds=4)

    def in_many_slices(*args, **kwargs):
        return run_kernel_with({"SLICES": 11}, *args, **kwargs)

    check(in_many_slices, step)


def test_no_gradients_no_negatives(run_kernel, device):
    step = draw(9, 50, 32, torch.float32, device)
    loss, image, text, _, texts, images = run_kernel(
        "momentum_contrastive.losses", "momentum_contrastive", *step.arguments(), True, False, False
    )
    assert loss == check(run_kernel, step)[0]
    assert image.shape == text.shape == (0, 32) and texts.shape == images.shape == (0,)


def test_bitwise_deterministic(run_kernel, device):
    step = draw(20, 100, 32, torch.bfloat16, device, kinds=9)
    for first, second in zip(check(run_kernel, step), check(run_kernel, step), strict=True):
        assert torch.equal(first, second)
