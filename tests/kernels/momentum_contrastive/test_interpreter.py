"""The momentum-contrastive kernels against the float64 reference: interpreted, or on a GPU."""

import math

import pytest
import torch
from fastvlp_tests.momentum_cases import NAMES, check_fitted, draw
from fastvlp_tests.tolerance import assert_as_accurate, epsilon
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlp.ops import momentum_contrastive

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(run_kernel, step, teacher=True):
    ours = run_kernel(
        "momentum_contrastive.losses",
        "momentum_contrastive",
        *step.arguments(),
        teacher,
        True,
        True,
    )
    exact = step.run(momentum_contrastive, torch.float64)
    dtype, batch = step.features[0].dtype, len(step.features[0])
    longest = max(t.double().nan_to_num().norm(dim=1).max().item() if len(t) else 0.0
                  for t in step.features)  # fmt: skip
    # The kernels round products, logits and weights once each: nothing like the eager logits of
    # the features' dtype, so the bound is that of these roundings alone.
    rounding = epsilon(torch.float32) * (longest**2 / step.temperature + math.log(1000))
    weights = epsilon(dtype) if dtype != torch.float32 else 0.0
    share = longest / (math.sqrt(batch) * step.temperature)
    terms = share * (2 * rounding + weights)
    floors = {
        # The teacher's part of the loss comes from its weighted keys.
        "loss": 2 * rounding + weights * longest**2 / step.temperature,
        "image": terms + epsilon(dtype) * exact[1].norm().item(),
        "text": terms + epsilon(dtype) * exact[2].norm().item(),
        "temperature": terms * longest * math.sqrt(2 * batch) / step.temperature,
    }
    for name, our, true in zip(NAMES, ours, exact, strict=False):
        assert_as_accurate(name, our, true, true, floors[name])
    assert ours[1].dtype == ours[2].dtype == dtype
    for sampled, known in zip(ours[4:], exact[4:], strict=True):
        assert (sampled != known).sum() <= 1
    return ours


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
