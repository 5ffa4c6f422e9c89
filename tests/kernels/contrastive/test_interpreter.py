"""The contrastive kernels against the float64 formulas: interpreted, or on a GPU."""

import math

import pytest
import torch
from fastvlp_tests import contrastive_formulas as formulas
from fastvlp_tests.contrastive_cases import eager_contrastive, well_fitted
from fastvlp_tests.contrastive_formulas import (
    SINGLE,
    check_gradients,
    check_sigmoid,
    check_statistics,
    draw,
    in_classes,
)
from fastvlp_tests.tolerance import assert_as_accurate, epsilon
from hypothesis import given, settings
from hypothesis import strategies as st

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PROBLEMS = {
    "m": st.sampled_from([1, 2, 31, 33, 64, 97]),
    "n": st.sampled_from([1, 15, 16, 17, 50, 80]),
    "width": st.sampled_from([1, 7, 16, 32, 48, 65]),
    "dtype": st.sampled_from(DTYPES),
    "offset": st.sampled_from([-20, 0, 3, 40]),
    "scale": st.sampled_from([1.0, 10.0, 100.0]),
    "norm": st.sampled_from([1.0, 0.05, None]),
    "gap": st.sampled_from([0, 3, 16]),
    "seed": st.integers(0, 3),
}


@settings(max_examples=25)
@given(**PROBLEMS)
def test_statistics(run_kernel, device, **drawn):
    check_statistics(run_kernel, draw(device=device, **drawn))


@settings(max_examples=25)
@given(workspace=st.sampled_from([1 << 12, 1 << 14, 1 << 20]), **PROBLEMS)
def test_gradients(run_kernel, device, workspace, **drawn):
    check_gradients(run_kernel, draw(device=device, **drawn), [0.3, 0.2], workspace)


@settings(max_examples=25)
@given(
    bias=st.sampled_from([-10.0, 0.0, 5.0]),
    workspace=st.sampled_from([1 << 12, 1 << 14, 1 << 20]),
    **PROBLEMS,
)
def test_sigmoid(run_kernel, device, workspace, **drawn):
    check_sigmoid(run_kernel, draw(device=device, **drawn), workspace, weight=0.25)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, cols", [(True, False), (False, True)])
def test_one_direction(run_kernel, device, dtype, rows, cols):
    problem = draw(70, 45, 40, dtype, device, offset=2)
    check_statistics(run_kernel, problem, rows=rows, cols=cols)
    check_gradients(run_kernel, problem, [0.5, 0.5], 1 << 14, rows=rows, cols=cols)


@pytest.mark.parametrize("cols", [True, False])
def test_statistics_in_several_chunks(run_kernel_with, device, cols):
    problem = draw(200, 90, 24, torch.float32, device, scale=30.0)

    def in_chunks(*args, **kwargs):
        return run_kernel_with({"PAIR_BYTES": 1}, *args, **kwargs)

    check_statistics(in_chunks, problem, cols=cols)


def test_one_feature_against_itself(run_kernel, device):
    # A softmax over one column is 1: loss and gradient vanish exactly.
    problem = draw(1, 1, 8, torch.float32, device)
    rows, cols, _ = check_statistics(run_kernel, problem)
    assert rows == cols == -torch.inf
    dx, dy = check_gradients(run_kernel, problem, [0.5, 0.5], 1 << 12)
    assert not dx.any() and not dy.any()


def test_fitted_pairs_are_relatively_exact(run_kernel, device):
    # The loss is 1e-7: what is left is the rounding of logits of 100.
    x, y = (t.to(device) for t in well_fitted(70, 64, 100.0, 1.0, 1e-7))
    problem = formulas.Problem(x, y, torch.tensor([100.0], device=device), None, 0)
    args = problem.x, problem.y, problem.scale
    found = run_kernel("contrastive.forward", "contrastive_statistics", *args)
    exact = formulas.statistics(problem, torch.float64)
    for lse, true in zip(found[:2], exact[:2], strict=True):
        loss, wanted = (torch.nn.functional.softplus(a - b) for a, b in
                        ((lse, found[2]), (true, exact[2])))  # fmt: skip
        torch.testing.assert_close(loss.double(), wanted, rtol=1e-4, atol=0)
    weights = torch.tensor([0.5, 0.5], device=device)
    ours = run_kernel(
        "contrastive.backward", "contrastive_gradients", *args,
        *formulas.gradient_inputs(problem, weights), weights, workspace_bytes=1 << 14,
    )  # fmt: skip
    g = formulas.softmax_gradient(problem, weights, torch.float64)
    for got, true in zip(ours[:2], formulas.through_matmul(problem, g), strict=True):
        assert (got - true).norm() <= 2e-5 * true.norm()


@pytest.mark.parametrize("m, n", [(0, 5), (5, 0)])
def test_empty(run_kernel, device, m, n):
    problem = draw(m, n, 8, torch.float32, device)
    row_lse, col_lse, positive = run_kernel(
        "contrastive.forward", "contrastive_statistics", problem.x, problem.y, problem.scale
    )
    assert row_lse.shape == (m,) and col_lse.shape == (n,) and positive.shape == (m,)
    assert (row_lse == -torch.inf).all() and (col_lse == -torch.inf).all()
    dx, dy, dscale = run_kernel(
        "contrastive.backward", "contrastive_gradients", problem.x, problem.y, problem.scale,
        row_lse, col_lse, positive, torch.ones(2, device=device), workspace_bytes=1 << 12,
    )  # fmt: skip
    assert dx.shape == (m, 8) and dy.shape == (n, 8) and not dx.any() and not dy.any()
    assert dscale == 0
    result = run_kernel(
        "contrastive.sigmoid", "sigmoid_contrastive", problem.x, problem.y, problem.scale,
        problem.bias, workspace_bytes=1 << 12,
    )  # fmt: skip
    assert result.loss_sum == 0 and result.g_sum == 0 and result.dscale == 0
    assert result.dx.shape == (m, 8) and not result.dx.any() and not result.dy.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_far_rows_and_columns_do_not_underflow(run_kernel, device, dtype):
    # Row 3 and column 5 lie 2,000 below the rest of their tile: relative to its maximum they are 0.
    problem = draw(40, 40, 16, dtype, device, scale=100.0)
    for side, index in ((problem.x, 3), (problem.y, 5)):
        side[:, 0] = 4
        side[index, 0] = -1
    check_statistics(run_kernel, problem)
    check_gradients(run_kernel, problem, [0.5, 0.5], 1 << 14)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cosine", [0.0, 0.5, 0.9, 1.0])
def test_features_in_classes(run_kernel, device, dtype, cosine):
    # At scale 100 logits of one class and of two lie up to 100 apart within every tile; at cosine 1
    # all features of a class are equal.
    problem = draw(70, 70, 64, dtype, device, scale=100.0)
    problem.x.copy_(in_classes(70, 64, cosine, dtype, device))
    problem.y.copy_(in_classes(70, 64, cosine, dtype, device).roll(4, 0))
    check_statistics(run_kernel, problem)
    check_gradients(run_kernel, problem, [0.5, 0.5], 1 << 14)


def test_huge_logits(run_kernel, device):
    problem = draw(50, 60, 64, torch.float32, device, scale=400.0, norm=5.0)
    assert problem.logits(torch.float64).abs().max() > 4e3
    check_statistics(run_kernel, problem)
    check_gradients(run_kernel, problem, [0.5, 0.5], 1 << 14)
    check_sigmoid(run_kernel, problem, 1 << 14)


def test_integer_logits_of_ten_thousand_are_exact(run_kernel, device):
    # 10,000 for the positives, 0 for the negatives: no softmax keeps anything of these.
    n = 40
    problem = draw(n, n, n, torch.float32, device, scale=10_000.0)
    eye = torch.eye(n, device=device)
    problem.x.copy_(eye)
    problem.y.copy_(eye)
    rows, cols, positive = check_statistics(run_kernel, problem)
    assert (positive == 10_000).all()
    torch.testing.assert_close(rows, torch.full_like(rows, math.log(n - 1)))
    torch.testing.assert_close(cols, rows)
    dx, dy = check_gradients(run_kernel, problem, [0.5, 0.5], 1 << 14)
    assert not dx.any() and not dy.any()


@pytest.mark.parametrize("target", [0.3, 1.0, 3.0])
def test_the_scale_gradient_is_as_exact_as_eager(run_kernel, device, target):
    # At 100 the log-sum-exps' own rounding to float32 would be five times eager's error.
    weights = torch.tensor([0.5, 0.5], device=device)
    ours, eager, exact = [], [], []
    for seed in range(4):
        x, y = (t.to(device) for t in well_fitted(48, 32, 100.0, 1.0, target, seed=seed))
        problem = formulas.Problem(x, y, torch.tensor([100.0], device=device), None, 0)
        args = problem.x, problem.y, problem.scale
        rows, cols, positive = run_kernel("contrastive.forward", "contrastive_statistics", *args)
        lse = torch.logaddexp(rows, positive), torch.logaddexp(cols, positive)
        missing = (torch.sigmoid(t - positive) for t in (rows, cols))
        found = run_kernel(
            "contrastive.backward", "contrastive_gradients", *args, *lse,
            -0.5 * sum(missing).float(), weights, workspace_bytes=1 << 20,
        )  # fmt: skip
        ours.append(found[2])
        for dtype, results in ((torch.float32, eager), (torch.float64, exact)):
            leaf = torch.tensor(100.0, dtype=dtype, device=device, requires_grad=True)
            (len(x) * eager_contrastive(x.to(dtype), y.to(dtype), leaf, 0.0)).backward()
            results.append(leaf.grad)
    assert_as_accurate("dscale", *map(torch.stack, (ours, eager, exact)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_scale_gradient_is_summed_before_rounding(run_kernel, device, dtype):
    # Of a nearly uniform softmax: entries rounded to one half-precision number are off alike.
    problem = draw(31, 17, 16, dtype, device, offset=-20, scale=1.0, norm=0.05, seed=1)
    weights = torch.tensor([0.3, 0.2], device=device)
    contrastive = run_kernel(
        "contrastive.backward", "contrastive_gradients", problem.x, problem.y, problem.scale,
        *formulas.gradient_inputs(problem, weights), weights, offset=-20, workspace_bytes=1 << 14,
    )  # fmt: skip
    sigmoid = check_sigmoid(run_kernel, problem, 1 << 14)
    for ours, g in (
        (contrastive[2], formulas.softmax_gradient(problem, weights, torch.float64)),
        (sigmoid.dscale, formulas.sigmoid_terms(problem, torch.float64)[1]),
    ):
        true, size = formulas.scale_gradient(problem, g)
        assert abs(ours.double() - true) <= formulas.sharpness(problem) * size


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_scale_of_zero_has_a_gradient(run_kernel, device, dtype):
    problem = draw(40, 40, 16, dtype, device, scale=0.0)
    dx, dy = check_gradients(run_kernel, problem, [0.5, 0.5], 1 << 14)
    ours = check_sigmoid(run_kernel, problem, 1 << 14)
    assert not any(t.any() for t in (dx, dy, ours.dx, ours.dy))
    assert ours.dscale != 0


def test_tiny_probabilities_survive_half_precision(run_kernel, device):
    # Uniform softmax with an upstream gradient of 1e-6: g is 2e-9, nothing in float16.
    problem = draw(64, 64, 32, torch.float16, device, scale=1e-3)
    check_gradients(run_kernel, problem, [5e-7, 5e-7], 1 << 14)
    zero, also_zero = check_gradients(run_kernel, problem, [0.0, 0.0], 1 << 14)
    assert not zero.any() and not also_zero.any()


def test_far_negatives_are_relatively_exact(run_kernel, device):
    # At a bias of -20 each negative costs 2e-9, which 1 + exp(z) rounds away.
    problem = draw(64, 64, 32, torch.float32, device, offset=100, scale=1.0, bias=-20.0)
    ours = check_sigmoid(run_kernel, problem, 1 << 14)
    loss, g = formulas.sigmoid_terms(problem, torch.float64)
    torch.testing.assert_close(ours.loss_sum.double(), loss.sum(), rtol=4 * SINGLE, atol=0)
    torch.testing.assert_close(ours.g_sum.double(), g.sum(), rtol=4 * SINGLE, atol=0)


def test_tiny_sigmoid_gradients_survive_half_precision(run_kernel, device):
    # g is 1e-7 throughout, which float16 alone would store in steps of 6e-8.
    problem = draw(64, 64, 32, torch.float16, device, offset=100, scale=1.0, bias=-16.0)
    ours = check_sigmoid(run_kernel, problem, 1 << 14, weight=1e4)
    _, g = formulas.sigmoid_terms(problem, torch.float64)
    for our, true in zip((ours.dx, ours.dy), formulas.through_matmul(problem, g), strict=True):
        true = 1e4 * true
        assert (our.double() - true).norm() <= epsilon(torch.float16) * true.norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_spreads_as_far_as_it_reaches(run_kernel, device, dtype):
    problem = draw(70, 50, 24, dtype, device)
    problem.x[33, 5] = torch.nan
    rows, cols, positive = run_kernel(
        "contrastive.forward", "contrastive_statistics", problem.x, problem.y, problem.scale
    )
    hit = torch.arange(70, device=device) == 33
    assert torch.equal(rows.isnan(), hit)
    assert torch.equal(positive.isnan(), hit)
    assert torch.equal(cols.isnan(), ~hit[:50])  # the positive of column 33 is in none of its sums
    weights = torch.tensor([0.5, 0.0], device=device)
    row_lse, _, positive_gradient = formulas.gradient_inputs(problem, weights)
    dx, dy, dscale = run_kernel(
        "contrastive.backward", "contrastive_gradients", problem.x, problem.y, problem.scale,
        row_lse, None, positive_gradient, weights, workspace_bytes=1 << 14,
    )  # fmt: skip
    assert torch.equal(dx.isnan().any(1), hit) and dy.isnan().all() and dscale.isnan()
    result = run_kernel(
        "contrastive.sigmoid", "sigmoid_contrastive", problem.x, problem.y, problem.scale,
        problem.bias, workspace_bytes=1 << 14,
    )  # fmt: skip
    assert result.loss_sum.isnan() and result.g_sum.isnan()
    assert torch.equal(result.dx.isnan().any(1), hit) and result.dy.isnan().all()


def test_same_bits_twice(run_kernel, device):
    problem = draw(150, 130, 40, torch.float16, device, scale=50.0)

    def everything():
        args = (problem.x, problem.y, problem.scale)
        found = run_kernel("contrastive.forward", "contrastive_statistics", *args)
        weights = torch.tensor([0.5, 0.5], device=device)
        found += run_kernel(
            "contrastive.backward", "contrastive_gradients", *args,
            *formulas.gradient_inputs(problem, weights), weights, workspace_bytes=1 << 14,
        )  # fmt: skip
        return found + tuple(
            run_kernel(
                "contrastive.sigmoid", "sigmoid_contrastive", *args, problem.bias,
                workspace_bytes=1 << 14,
            )
        )  # fmt: skip

    for first, second in zip(everything(), everything(), strict=True):
        assert torch.equal(first, second)


def test_only_what_is_needed(run_kernel, device):
    problem = draw(40, 30, 16, torch.float32, device)
    args = (problem.x, problem.y, problem.scale)
    found = run_kernel("contrastive.forward", "contrastive_statistics", *args)
    weights = torch.tensor([0.5, 0.5], device=device)

    def gradients(**needed):
        return run_kernel(
            "contrastive.backward", "contrastive_gradients", *args, *found, weights,
            workspace_bytes=1 << 14, **needed,
        )  # fmt: skip

    dx, dy, dscale = gradients()
    only_x, only_y = gradients(need_y=False), gradients(need_x=False)
    assert torch.equal(only_x[0], dx) and only_x[1] is None and only_x[2] == dscale
    assert torch.equal(only_y[1], dy) and only_y[0] is None and only_y[2] is None
    loss_only, full = (
        run_kernel(
            "contrastive.sigmoid", "sigmoid_contrastive", *args, problem.bias,
            workspace_bytes=1 << 20, need_gradients=need,
        )
        for need in (False, True)
    )  # fmt: skip
    assert loss_only.dx is None and loss_only.dy is None and loss_only.dscale is None
    assert torch.equal(loss_only.loss_sum, full.loss_sum)


def test_unusable_arguments_say_why(run_kernel, device):
    problem = draw(4, 4, 8, torch.float32, device)
    with pytest.raises(ValueError, match="both must have one dtype"):
        run_kernel(
            "contrastive.forward",
            "contrastive_statistics",
            problem.x,
            problem.y.half(),
            problem.scale,
        )
    with pytest.raises(ValueError, match="scale must be a float32 tensor"):
        run_kernel(
            "contrastive.forward",
            "contrastive_statistics",
            problem.x,
            problem.y,
            problem.scale.double(),
        )
    with pytest.raises(ValueError, match="at least one log-sum-exp"):
        run_kernel(
            "contrastive.forward", "contrastive_statistics", problem.x, problem.y, problem.scale,
            rows=False, cols=False,
        )  # fmt: skip
    with pytest.raises(ValueError, match="workspace_bytes is 10, but one row"):
        run_kernel(
            "contrastive.sigmoid", "sigmoid_contrastive", problem.x, problem.y, problem.scale,
            problem.bias, workspace_bytes=10,
        )  # fmt: skip
    with pytest.raises(ValueError, match="both None"):
        run_kernel(
            "contrastive.backward", "contrastive_gradients", problem.x, problem.y, problem.scale,
            None, None, torch.ones(4, device=device), torch.ones(2, device=device),
            workspace_bytes=1 << 12,
        )  # fmt: skip
