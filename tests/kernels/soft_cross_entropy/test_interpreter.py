"""The Triton pass of soft cross entropy against float64: interpreted, or on a GPU."""

import pytest
import torch
from fastvlp_tests.soft_cross_entropy_kernels import NAMES, check, draw, formula, run
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(max_examples=25)
@given(
    rows=st.sampled_from([1, 2, 7]),
    cols=st.sampled_from([1, 31, 32, 33, 64, 100]),
    # The interpreter truncates where it should round to bfloat16: the compiled kernel alone does.
    dtype=st.sampled_from([torch.float32, torch.float16]),
    scale=st.sampled_from([0.1, 3.0, 30.0]),
    offset=st.sampled_from([0.0, -50.0, 2000.0]),
    bias=st.booleans(),
    teacher=st.booleans(),
    align=st.sampled_from([1, 16]),
    seed=st.integers(0, 3),
)
def test_matches_float64(run_kernel, device, rows, cols, dtype, **drawn):
    check(run_kernel, draw(rows, cols, device, **drawn), dtype)


def test_losses_alone_are_the_same(run_kernel, device):
    sampled = draw(5, 70, device)
    both, alone = run(run_kernel, sampled), run(run_kernel, sampled, gradient=False)
    assert torch.equal(both[0], alone[0]) and alone[1].numel() == 0


def test_gradient_may_replace_the_logits(run_kernel, device):
    sampled = draw(6, 75, device)
    expected = run(run_kernel, sampled)
    logits = sampled["logits"].clone()
    losses, gradient = run_kernel(
        "soft_cross_entropy.rows", "soft_cross_entropy_rows", logits,
        *(sampled[name] for name in NAMES[1:]), -100, torch.empty(6, device=device), logits,
    )  # fmt: skip
    assert torch.equal(losses, expected[0]) and torch.equal(gradient, expected[1])


def test_impossible_tokens(run_kernel, device):
    # A whole block is ruled out by both, and one more token by the teacher alone.
    sampled = draw(4, 90, device)
    sampled["labels"].fill_(5)
    sampled["bias"][32:64] = -torch.inf
    sampled["teacher_bias"][32:64] = -torch.inf
    sampled["teacher_bias"][70] = -torch.inf
    losses, gradient = run(run_kernel, sampled)
    kept = [*range(32), *range(64, 90)]
    small = {k: t[..., kept] if t.shape[-1:] == (90,) else t for k, t in sampled.items()}
    exact = formula(small, torch.float64)
    torch.testing.assert_close(losses.double(), exact[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient[:, kept].double(), exact[1], rtol=1e-4, atol=1e-7)
    assert not gradient[:, 32:64].any()


def test_padding_of_gradients_is_zero(run_kernel, device):
    sampled = draw(5, 70, device)
    sampled["labels"][3] = 70  # a bad one
    for dtype in (torch.float32, torch.float16):
        wide = torch.full((5, 80), torch.nan, dtype=dtype, device=device)
        _, gradient = run_kernel(
            "soft_cross_entropy.rows", "soft_cross_entropy_rows", *sampled.values(), -100,
            torch.empty(5, device=device), wide[:, :70],
        )  # fmt: skip
        beyond = gradient.as_strided((5, 2), (80, 1), 70)
        assert not beyond.any() and gradient[3].isnan().all()


def test_a_label_out_of_range_gives_nan_in_its_row_alone(run_kernel, device):
    sampled = draw(5, 40, device)
    sampled["labels"][0], sampled["labels"][3] = 40, -7
    losses, gradient = run(run_kernel, sampled)
    bad = torch.tensor([True, False, False, True, False], device=device)
    assert torch.equal(losses.isnan(), bad) and torch.equal(gradient.isnan().all(1), bad)
    assert torch.equal(gradient.isnan().any(1), bad)


def test_nan_stays_in_its_row(run_kernel, device):
    sampled = draw(5, 40, device)
    sampled["logits"][1, 33] = torch.nan
    losses, gradient = run(run_kernel, sampled)
    bad = torch.tensor([False, True, False, False, False], device=device)
    assert torch.equal(losses.isnan(), bad) and torch.equal(gradient.isnan().any(1), bad)


def test_no_rows(run_kernel, device):
    losses, gradient = run(run_kernel, draw(0, 40, device))
    assert losses.shape == (0,) and gradient.shape == (0, 40)


def test_unusable_arguments_say_why(run_kernel, device):
    sampled = draw(3, 40, device)
    with pytest.raises(ValueError, match="logits must be float32, got torch.float16"):
        run(run_kernel, {**sampled, "logits": sampled["logits"].half()})
    with pytest.raises(ValueError, match=r"teacher must be \(3, 40\) with unit stride"):
        run(run_kernel, {**sampled, "teacher": sampled["teacher"][:, :30]})
