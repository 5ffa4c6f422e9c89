"""soft_cross_entropy against its float64 reference, over everything a trainer may pass."""

import math

import pytest
import torch
from fastvlp_tests.soft_cross_entropy_cases import LEAVES, draw, run
from fastvlp_tests.tolerance import assert_as_accurate, epsilon
from hypothesis import given
from hypothesis import strategies as st

from fastvlp.ops import (
    release_workspace,
    select_rows,
    soft_cross_entropy,
    soft_cross_entropy_reference,
)
from fastvlp.ops._core import workspace
from fastvlp.ops.soft_cross_entropy.register import make_plan

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ISAS = torch.ops.fastvlp.cpu_instruction_sets().split(",")
SINGLE = epsilon(torch.float32)


def row_gradients(case, row_weights):
    """float64: derivatives w.r.t. the logits, and the largest logit."""
    case = case.to(torch.float64)
    logits = case.hidden @ case.weight.T + (0 if case.bias is None else case.bias)
    logits.requires_grad_()
    eye = torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)
    case.hidden, case.weight, case.bias = logits, eye, None
    losses = case.call(soft_cross_entropy_reference, reduction="none")
    (losses * row_weights.double()).sum().backward()
    return logits.grad.abs(), logits.detach().abs().max().item()


def check(case, seed=0, reduction="none", **options):
    """Every row's loss with its own weight upstream, so that no error hides; or their sum."""
    rows = case.labels.numel()
    upstream = torch.rand(rows, generator=torch.Generator().manual_seed(seed)) - 0.3
    upstream = (upstream if reduction == "none" else upstream[0]).to(case.labels.device)
    ours = run(soft_cross_entropy, case, upstream, reduction=reduction, **options)
    eager = run(soft_cross_entropy_reference, case, upstream, reduction=reduction)
    double = case.to(torch.float64)
    exact = run(soft_cross_entropy_reference, double, upstream, reduction=reduction)
    deltas, largest = row_gradients(case, upstream)
    dtype = case.hidden.dtype
    # Logits are rounded to the matmuls' dtype, and so are their derivatives: what that does to a
    # loss, and to the sums of a gradient, whose terms are rounded with random signs.
    rounding = (SINGLE + (epsilon(dtype) if dtype != torch.float32 else 0)) * (largest + 1)
    rounding += SINGLE * math.log(len(case.weight))
    assert ours[0].dtype == torch.float32
    assert ours[0].shape == (case.labels.shape if reduction == "none" else ())
    assert_as_accurate("loss", ours[0], eager[0], exact[0], rounding * math.sqrt(rows))
    squares = deltas.square()
    terms = {
        "hidden": squares @ case.weight.double().square(),
        "weight": squares.T @ case.hidden.double().square(),
        "bias": squares.sum(0),
    }
    for name, our, near, true in zip(LEAVES, ours[1:], eager[1:], exact[1:], strict=True):
        if true is None:
            assert our is None
            continue
        assert our.dtype == getattr(case, name).dtype
        floor = rounding * terms[name].sum().sqrt().item()
        floor += epsilon(our.dtype) * true.norm().item()
        assert_as_accurate(name, our, near, true, floor)
    return ours


@given(
    rows=st.sampled_from([1, 2, 5, 17, 40]),
    width=st.sampled_from([1, 3, 16, 50]),
    vocabulary=st.sampled_from([1, 2, 31, 64, 1023, 1025, 2500]),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([0.1, 3.0, 30.0]),
    teacher=st.booleans(),
    bias=st.booleans(),
    ignored=st.booleans(),
    master=st.booleans(),
    workspace=st.sampled_from([1, 60_000, 1 << 28]),
    reduction=st.sampled_from(["none", "sum"]),
    seed=st.integers(0, 3),
)
def test_matches_float64(
    device, rows, width, vocabulary, dtype, workspace, reduction, seed, **sampled
):
    case = draw(rows, width, vocabulary, dtype, device, seed=seed, **sampled)
    check(case, seed, reduction, workspace_bytes=workspace)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("workspace", [3 << 20, 1 << 28])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_a_real_vocabulary(device, dtype, workspace, reduction):
    # Several blocks of the vocabulary in every matmul, several groups of rows in the small one.
    case = draw(70, 24, 9001, dtype, device)
    check(case, reduction=reduction, workspace_bytes=workspace)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(monkeypatch, dtype, isa):
    monkeypatch.setenv("FASTVLP_CPU_ISA", isa)
    for rows, width, vocabulary in ((1, 1, 1), (13, 33, 2077), (40, 20, 4100)):
        for teacher in (True, False):
            check(draw(rows, width, vocabulary, dtype, "cpu", teacher=teacher))


@pytest.mark.parametrize("workspace", [1, 30_000, 1 << 28])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reductions(device, dtype, reduction, workspace):
    # One row at a time, groups of rows whose gradients the forward pass adds up, all rows kept.
    case, upstream = draw(30, 20, 700, dtype, device), torch.tensor(3.7)
    ours = run(soft_cross_entropy, case, upstream, reduction=reduction, workspace_bytes=workspace)
    double = case.to(torch.float64)
    exact = run(soft_cross_entropy_reference, double, upstream.double(), reduction=reduction)
    eager = run(soft_cross_entropy_reference, case, upstream, reduction=reduction)
    for our, near, true in zip(ours, eager, exact, strict=True):
        assert_as_accurate(reduction, our, near, true, epsilon(dtype) * true.norm().item())
    assert ours[0].shape == ()


def test_a_scaled_loss_keeps_small_half_precision_gradients(device):
    # As a gradient scaler does: the gradients alone are too small for float16.
    case = draw(40, 16, 900, torch.float16, device)
    scale = torch.tensor(2.0**14)
    early, late = (
        run(soft_cross_entropy, case, scale, workspace_bytes=size) for size in (1 << 15, 1 << 28)
    )
    exact = run(soft_cross_entropy_reference, case.to(torch.float64), scale.double())
    for ours, expected, true in zip(early, late, exact, strict=True):
        floor = epsilon(ours.dtype) * true.norm().item()
        assert_as_accurate("scaled", ours, expected, true, floor)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_loss_is_the_same_bits_without_gradients(monkeypatch, isa, dtype):
    monkeypatch.setenv("FASTVLP_CPU_ISA", isa)
    # Groups of a few rows, whose products are rounded otherwise than those of more rows.
    for seed, (rows, width, vocabulary) in enumerate(((40, 8, 900), (13, 33, 2077), (30, 20, 700))):
        case = draw(rows, width, vocabulary, dtype, "cpu", teacher=seed % 2 == 0, seed=seed)
        case.weight.requires_grad_()
        for reduction in ("none", "sum"):
            options = {"workspace_bytes": 1 << 15, "reduction": reduction}
            expected = case.call(soft_cross_entropy, **options).detach()
            with torch.no_grad():
                assert torch.equal(case.call(soft_cross_entropy, **options), expected)


def test_without_gradients_none_are_computed(device):
    case = draw(40, 8, 900, torch.float32, device)
    case.weight.requires_grad_()
    with torch.no_grad(), torch.profiler.profile() as profile:
        case.call(soft_cross_entropy, workspace_bytes=1 << 15)
    names = {event.key for event in profile.key_averages()}
    assert "fastvlp::soft_cross_entropy_losses" in names
    assert "fastvlp::soft_cross_entropy_losses_and_gradients" not in names


def test_agrees_with_cross_entropy_of_torch(device):
    case = draw(20, 16, 300, torch.float32, device, teacher=False)
    logits = torch.nn.functional.linear(case.hidden, case.weight, case.bias)
    for reduction in ("mean", "sum", "none"):
        expected = torch.nn.functional.cross_entropy(logits, case.labels, reduction=reduction)
        torch.testing.assert_close(case.call(soft_cross_entropy, reduction=reduction), expected)


def test_agrees_with_probability_targets_of_torch(device):
    case = draw(20, 16, 300, torch.float32, device, ignored=False)
    logits = torch.nn.functional.linear(case.hidden, case.weight, case.bias)
    soft = torch.nn.functional.linear(case.teacher_hidden, case.teacher_weight, case.teacher_bias)
    hot = torch.nn.functional.one_hot(case.labels, 300)
    target = 0.6 * hot + 0.4 * soft.softmax(-1)
    expected = torch.nn.functional.cross_entropy(logits, target)
    torch.testing.assert_close(case.call(soft_cross_entropy), expected)
    case.alpha = torch.tensor(0.4, device=device)
    torch.testing.assert_close(case.call(soft_cross_entropy), expected)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_extreme_alpha(device, alpha):
    case = draw(12, 16, 300, torch.float32, device)
    case.alpha = alpha
    check(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits(device, dtype):
    # Logits of +-1e4: every softmax is one-hot, and those of a block may lie 1e4 below the rest.
    case = draw(12, 16, 2500, dtype, device, scale=3000.0)
    check(case)
    case.bias[:1024] -= 5000
    check(case)


def test_a_common_offset_changes_nothing(device):
    case = draw(12, 16, 2500, torch.float32, device)
    plain = run(soft_cross_entropy, case)
    case.bias, case.teacher_bias = case.bias + 4096, case.teacher_bias - 4096
    for ours, expected in zip(run(soft_cross_entropy, case), plain, strict=True):
        # What is left of the logits next to an offset of 2**12.
        atol = 2**12 * SINGLE * expected.abs().max().item()
        torch.testing.assert_close(ours, expected, rtol=2**12 * SINGLE, atol=atol)


def test_impossible_tokens(device):
    # Ruled out by both: as if they were not there. By the teacher alone: no target.
    case = draw(9, 16, 2500, torch.float32, device)
    case.labels.clamp_(max=900)
    case.bias[1000:2200] = -math.inf
    case.teacher_bias[990:2200] = -math.inf
    for ours, exact in zip(
        run(soft_cross_entropy, case),
        run(soft_cross_entropy_reference, case.to(torch.float64)),
        strict=True,
    ):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-7)


def test_nan_stays_in_its_row(device):
    case = draw(6, 8, 1500, torch.float32, device, ignored=False)
    case.hidden[2, 3] = math.nan
    losses, d_hidden, *_ = run(soft_cross_entropy, case, reduction="none")
    bad = torch.arange(6, device=device) == 2
    assert torch.equal(losses.isnan(), bad) and torch.equal(d_hidden.isnan().any(1), bad)


def test_nan_in_an_ignored_row_goes_nowhere(device):
    case = draw(6, 8, 200, torch.float32, device)
    case.hidden[1], case.teacher_hidden[4] = math.nan, math.inf
    results = run(soft_cross_entropy, case)
    assert all(t.isfinite().all() for t in results) and not results[1][1].any()


@pytest.mark.parametrize("teacher", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows_and_no_labelled_rows(device, teacher, reduction):
    for rows in (0, 4):
        case = draw(rows, 8, 50, torch.float32, device, teacher=teacher)
        case.labels.fill_(-100)
        loss, *gradients = run(soft_cross_entropy, case, reduction=reduction)
        assert loss.shape == (case.labels.shape if reduction == "none" else ())
        assert not loss.any() and not any(g.any() for g in gradients)


def test_leading_axes_and_strides(device):
    case = draw(24, 10, 90, torch.float32, device)
    flat = run(soft_cross_entropy, case)
    case.labels = case.labels.int().view(4, 6)
    for name in ("hidden", "teacher_hidden"):
        t = getattr(case, name)
        wide = torch.full((4, 6, 2 * t.shape[1]), math.nan, device=device)
        wide[..., ::2] = t.view(4, 6, -1)
        setattr(case, name, wide[..., ::2])
    case.weight = case.weight.T.contiguous().T
    shaped = run(soft_cross_entropy, case)
    for ours, expected in zip(shaped, flat, strict=True):
        torch.testing.assert_close(ours.reshape(expected.shape), expected)
    case.labels = case.labels[0, 0]
    case.hidden, case.teacher_hidden = case.hidden[0, 0], case.teacher_hidden[0, 0]
    assert case.call(soft_cross_entropy, reduction="none").shape == ()


def test_select_rows(device):
    case = draw(10, 8, 60, torch.float32, device)
    expected = run(soft_cross_entropy, case, reduction="sum")[0]
    labelled = case.labels != -100
    for most in (None, 7, 9, 100):
        labels, hidden, other = select_rows(
            case.labels, case.hidden, case.teacher_hidden, max_rows=most
        )
        count = int(labelled.sum()) if most is None else min(most, 10)
        assert labels.shape == (count,) and hidden.shape == (count, 8)
        assert torch.equal(labels[labels != -100], case.labels[labelled])
        assert torch.equal(hidden[labels != -100], case.hidden[labelled])
        small = draw(10, 8, 60, torch.float32, device)
        small.labels, small.hidden, small.teacher_hidden = labels, hidden, other
        torch.testing.assert_close(small.call(soft_cross_entropy, reduction="sum"), expected)
        if most is not None:
            ours = run(soft_cross_entropy, case, reduction="none", max_rows=most)
            torch.testing.assert_close(ours, run(soft_cross_entropy, case, reduction="none"))
    # On a GPU the host does not wait for the count of labelled rows.
    on_host = case.labels.cpu(), case.hidden.cpu()
    with pytest.raises(ValueError, match="max_rows: expected at least the 7 labelled rows, got 6"):
        select_rows(*on_host, max_rows=6)


def test_autocast_is_bfloat16_beside_master_weights(device):
    case = draw(20, 16, 300, torch.float32, device)
    with torch.autocast(device.type, torch.bfloat16):
        ours = run(soft_cross_entropy, case)
    low = draw(20, 16, 300, torch.bfloat16, device, master=True)
    low.hidden, low.weight = case.hidden.bfloat16(), case.weight
    low.teacher_hidden, low.teacher_weight = case.teacher_hidden.bfloat16(), case.teacher_weight
    for got, expected in zip(ours, run(soft_cross_entropy, low), strict=True):
        assert got.dtype == torch.float32 and torch.equal(got, expected.float())


def test_a_teacher_of_lower_precision(device):
    case = draw(20, 16, 300, torch.float32, device)
    case.teacher_hidden = case.teacher_hidden.bfloat16()
    case.teacher_weight = case.teacher_weight.bfloat16()
    check(case)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_bitwise_deterministic(device, reduction):
    options = {"workspace_bytes": 1 << 18, "reduction": reduction}
    for dtype in DTYPES:
        case = draw(40, 16, 3000, dtype, device)
        first, second = (run(soft_cross_entropy, case, **options) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), dtype


@pytest.mark.parametrize("workspace", [1 << 10, 1 << 28])
def test_gradient_only_where_asked(device, workspace):
    case = draw(10, 8, 60, torch.float32, device)
    for name in LEAVES:
        leaf = getattr(case, name).requires_grad_()
        case.call(soft_cross_entropy, workspace_bytes=workspace).backward()
        assert leaf.grad is not None
        assert all(getattr(case, o).grad is None for o in (*LEAVES, "teacher_hidden") if o != name)
        leaf.grad = None
        leaf.requires_grad_(False)
    case.teacher_hidden.requires_grad_()
    assert not case.call(soft_cross_entropy).requires_grad


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("workspace", [1 << 16, 1 << 28])
def test_backward_twice_with_retained_graph(device, workspace, reduction):
    case = draw(40, 8, 900, torch.float32, device)
    case.hidden.requires_grad_()
    loss = case.call(soft_cross_entropy, workspace_bytes=workspace, reduction=reduction).sum()
    (first,) = torch.autograd.grad(loss, case.hidden, retain_graph=True)
    first = first.clone()
    draw(9, 8, 900, torch.float32, device, seed=1).call(soft_cross_entropy)
    (second,) = torch.autograd.grad(loss, case.hidden)
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-8)


def test_two_losses_between_forward_and_backward(device):
    case = draw(40, 8, 900, torch.float32, device)
    alone = run(soft_cross_entropy, case)[1]
    case.hidden.requires_grad_()
    other = draw(40, 8, 900, torch.float32, device, seed=1)
    other.hidden.requires_grad_()
    (case.call(soft_cross_entropy) + other.call(soft_cross_entropy)).backward()
    assert torch.equal(case.hidden.grad, alone)


def test_the_workspace_is_reused(device):
    release_workspace()
    case = draw(40, 8, 900, torch.float32, device)
    addresses = []
    for _ in range(2):
        run(soft_cross_entropy, case)
        addresses += [b.data_ptr() for b in workspace._free]
    assert len(addresses) == (2 if device.type == "cpu" else 0) and len(set(addresses)) <= 1
    release_workspace()


def test_float64_runs_the_reference_and_passes_gradcheck(device):
    case = draw(4, 3, 7, torch.float32, device).to(torch.float64)
    leaves = [getattr(case, name).requires_grad_() for name in LEAVES]

    def loss(hidden, weight, bias):
        case.hidden, case.weight, case.bias = hidden, weight, bias
        return case.call(soft_cross_entropy)

    assert torch.autograd.gradcheck(loss, leaves)


def test_reference_by_hand():
    # Logits (0, log 3): probabilities 1/4 and 3/4; the teacher says 1/2 each.
    hidden, weight = torch.ones(1, 1), torch.tensor([[0.0], [math.log(3)]])
    teacher = {"teacher_hidden": hidden, "teacher_weight": torch.zeros(2, 1), "alpha": 0.25}
    label = torch.tensor([1])
    hard, soft = math.log(4 / 3), (math.log(4) + math.log(4 / 3)) / 2
    found = soft_cross_entropy_reference(hidden, weight, None, label, **teacher).item()
    assert found == pytest.approx(0.75 * hard + 0.25 * soft)


@given(
    rows=st.integers(0, 10_000),
    cols=st.integers(1, 300_000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    workspace=st.integers(1, 1 << 30),
)
def test_plan_stays_within_its_budget(rows, cols, dtype, workspace):
    plan = make_plan(rows, cols, dtype, workspace)
    row_bytes = 4 * plan.group_floats // plan.group_rows
    assert 1 <= plan.chunk_rows <= plan.group_rows <= max(rows, 1)
    assert plan.group_rows == 1 or 4 * plan.group_floats <= workspace
    assert plan.chunk_rows == 1 or plan.chunk_rows * row_bytes <= 64 << 20
