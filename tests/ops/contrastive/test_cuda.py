"""The CUDA passes without a GPU: the kernels compiled for the CPU, and their composition with
similarities, against float64."""

import math
from unittest import mock

import pytest
import torch
from fastvlp_tests import cuda_passes
from fastvlp_tests.contrastive_cases import eager_contrastive, features, well_fitted
from fastvlp_tests.cuda_passes import assert_log_sum_exp, floats, matrix, without_positives
from fastvlp_tests.tolerance import assert_as_accurate, epsilon
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlp.ops import contrastive_reference
from fastvlp.ops.contrastive import cuda
from fastvlp.ops.contrastive.pairs import pair_losses

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SINGLE = epsilon(torch.float32)
INF, NAN = math.inf, math.nan


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return cuda_passes.compiled(tmp_path_factory.mktemp("contrastive_cu"))


@pytest.fixture(scope="module", params=["plain", "kernels"])
def passes(request):
    chosen = cuda_passes.PLAIN
    if request.param == "kernels":
        chosen = request.getfixturevalue("kernels")
    with cuda_passes.installed(chosen):
        yield


def empty_pairs(cols):
    return torch.stack((torch.full((cols,), -INF), torch.zeros(cols)))


# Sizes around the tiles of the kernels: 128 x 256 for statistics, 32 x 256 for gradients.
SIZES = {
    "rows": st.sampled_from([1, 2, 5, 31, 33, 127, 129]),
    "cols": st.sampled_from([1, 3, 4, 130, 255, 256, 257]),
    "gap": st.sampled_from([0, 1, 4, 16]),
    "offset": st.sampled_from([0, 1, -3, 200, -1000, 1000]),
    "deviation": st.sampled_from([1e-3, 1.0, 30.0]),
}


@given(**SIZES, wanted=st.sampled_from(["both", "rows", "cols"]), carried=st.booleans())
@settings(max_examples=60)
def test_statistics_kernel(kernels, rows, cols, gap, offset, deviation, wanted, carried):
    similarities = matrix(rows, cols, gap, deviation=deviation)
    before = matrix(4, cols, 0, seed=1) if carried else torch.empty(0, cols)
    scale = floats(2.5)
    row_negatives = torch.empty(rows if wanted != "cols" else 0, dtype=torch.float64)
    positive = torch.empty(rows)
    col_pairs = empty_pairs(cols) if wanted != "rows" else torch.empty(2, 0)
    if carried:
        kernels.statistics(
            before, scale, 0, torch.empty(0), torch.empty(4),
            col_pairs if wanted != "rows" else torch.empty(2, 0),
        )  # fmt: skip
    kernels.statistics(similarities, scale, offset, row_negatives, positive, col_pairs)
    z, exact = scale * similarities, 2.5 * similarities.double()
    pairs = cuda_passes.is_positive(similarities, offset)
    assert torch.equal(positive, torch.where(pairs, z, 0).sum(1))
    size = exact.abs().max().item() + math.log(rows + cols)
    exact = without_positives(exact, offset)
    if wanted != "cols":
        floor = SINGLE * size * math.sqrt(rows)
        eager = without_positives(z, offset).logsumexp(1)
        assert_log_sum_exp("rows", row_negatives, eager, exact.logsumexp(1), floor)
    if wanted != "rows":
        seen = torch.cat((without_positives(2.5 * before.double(), 0), exact))
        ours = col_pairs[0] + col_pairs[1].log()
        assert torch.equal(col_pairs[0], seen.float().amax(0))
        floor = SINGLE * (size + 2.5 * before.abs().sum().item()) * math.sqrt(cols)
        assert_log_sum_exp("cols", ours, seen.float().logsumexp(0), seen.logsumexp(0), floor)


def statistics_of(kernels, similarities):
    rows, cols = similarities.shape
    row_negatives, pairs = torch.empty(rows, dtype=torch.float64), empty_pairs(cols)
    kernels.statistics(similarities, floats(1.0), 0, row_negatives, torch.empty(rows), pairs)
    return row_negatives, pairs[0] + pairs[1].log()


def test_statistics_kernel_keeps_infinities_and_nan(kernels):
    similarities = matrix(40, 300, 0)
    similarities[3] = -INF
    similarities[:, 7] = -INF
    rows, cols = statistics_of(kernels, similarities)
    assert rows[3] == -INF and cols[7] == -INF
    assert rows.isfinite().sum() == 39 and cols.isfinite().sum() == 299
    similarities[5, 280] = NAN
    similarities[9, 20] = INF
    similarities[11, 11] = NAN  # a positive
    rows, cols = statistics_of(kernels, similarities)
    assert rows[5].isnan() and cols[280].isnan()
    assert not rows[9].isfinite() and not cols[20].isfinite()
    assert rows.isfinite().sum() == 37 and cols.isfinite().sum() == 297


@given(
    **SIZES,
    dtype=st.sampled_from(DTYPES),
    out_gap=st.sampled_from([0, 1, 8]),
    terms=st.sampled_from(["both", "rows", "cols"]),
)
@settings(max_examples=60)
def test_gradient_kernel(kernels, rows, cols, gap, offset, deviation, dtype, out_gap, terms):
    similarities = matrix(rows, cols, gap, deviation=deviation)
    scale, weights = floats(2.5), floats(0.5, 0.25)
    positives = -0.75 * torch.rand(rows, generator=torch.Generator().manual_seed(1))
    z = scale * similarities
    row_lse = z.double().logsumexp(1) if terms != "cols" else torch.empty(0)
    col_lse = z.double().logsumexp(0) if terms != "rows" else torch.empty(0)
    wide = torch.full((rows, cols + out_gap), NAN, dtype=dtype)
    out = wide[:, :cols]
    kernels.gradient(similarities, scale, row_lse, col_lse, positives, weights, offset, out)
    assert wide[:, cols:].isnan().all()
    eager, exact = torch.empty_like(out), torch.empty(rows, cols, dtype=torch.float64)
    others = row_lse, col_lse, positives, weights
    cuda_passes.PLAIN.gradient(similarities, scale, *others, offset, eager)
    cuda_passes.PLAIN.gradient(
        similarities.double(), scale, *(t.double() for t in others), offset, exact
    )
    floor = (epsilon(dtype) + SINGLE * z.abs().max().item()) * exact.norm().item()
    assert_as_accurate("gradient", out, eager, exact, floor)
    if dtype == torch.float32:
        kernels.gradient(similarities, scale, *others, offset, similarities)
        assert torch.equal(similarities, out)


@given(
    **SIZES,
    dtype=st.sampled_from(DTYPES),
    out_gap=st.sampled_from([0, 1, 8]),
    wanted=st.booleans(),
)
@settings(max_examples=60)
def test_sigmoid_kernel(kernels, rows, cols, gap, offset, deviation, dtype, out_gap, wanted):
    similarities = matrix(rows, cols, gap, deviation=deviation)
    scale, bias = floats(2.5), floats(-3.0)
    wide = torch.full((rows, cols + out_gap), NAN, dtype=dtype)
    out = wide[:, :cols] if wanted else torch.empty(0)
    sums = torch.tensor([7.0, -2.0], dtype=torch.float64)
    kernels.sigmoid(similarities, scale, bias, 8.0, offset, sums, out)
    assert wide[:, cols:].isnan().all()
    results = {}
    for name, t in (("eager", similarities), ("exact", similarities.double())):
        g = torch.empty(rows, cols, dtype=dtype if name == "eager" else torch.float64)
        totals = torch.zeros(2, dtype=torch.float64)
        cuda_passes.PLAIN.sigmoid(t, scale, bias, 8.0, offset, totals, g)
        results[name] = totals, g
    eager, exact = results["eager"], results["exact"]
    # torch's softplus is a straight line beyond 20: exp(-20) of each term is the slack of the sums.
    slack = (math.exp(-20) + SINGLE) * rows * cols * (1 + 3 + 2.5 * similarities.abs().max().item())
    assert_as_accurate("sums", sums - floats(7.0, -2.0), eager[0], exact[0], slack)
    if wanted:
        floor = (epsilon(dtype) + SINGLE * (3 + 10 * deviation)) * exact[1].norm().item()
        assert_as_accurate("gradient", out, eager[1], exact[1], floor)


def test_a_positive_past_the_last_column_is_none(kernels):
    # Columns 5 to 7 of the vector exist in the kernel's registers alone.
    sums = torch.zeros(2, dtype=torch.float64)
    similarities = torch.zeros(3, 5)
    kernels.sigmoid(similarities, floats(1.0), floats(-200.0), 1.0, 5, sums, torch.empty(0))
    assert sums[0] == 0 and sums[1].abs() < 1e-80


# --- composition with matmuls ---------------------------------------------------------------


NOTHING = torch.empty(0)  # logits kept between the passes: none on a GPU


def softmax_case(x, y, scale, offset, weights, dtype):
    """Log-sum-exps over negatives, positives and the gradients of the sum of w0 (lse_i - z) over
    rows and of w1 (lse_j - z) over columns, z the positive's logit, in plain PyTorch at `dtype`."""
    x, y = (t.to(dtype, copy=True).requires_grad_() for t in (x, y))
    real = torch.float64 if dtype == torch.float64 else torch.float32
    scale = scale.to(real, copy=True).requires_grad_()
    z = (scale * (x @ y.T)).to(real)
    positive = torch.where(cuda_passes.is_positive(z, offset), z, 0).sum(1)
    w = weights.to(real)
    loss = w[0] * z.logsumexp(1).sum() + w[1] * z.logsumexp(0).sum() - w.sum() * positive.sum()
    loss.backward()
    negatives = without_positives(z.detach(), offset)
    statistics = negatives.logsumexp(1), negatives.logsumexp(0), positive.detach()
    return *statistics, x.grad, y.grad, scale.grad


def from_statistics(found, n, offset, weights):
    """What `gradients` takes of the statistics `found`: log-sum-exps over all logits, and the
    gradients with respect to the positives' logits."""
    row_negatives, col_negatives, positive = (t.double() for t in found)
    pairs = cuda_passes.is_positive(torch.empty(len(positive), n), offset)
    logits, result, gradient = torch.where(pairs, positive[:, None], -INF), [], torch.zeros(())
    for lse, axis, weight in ((row_negatives, 1, weights[0]), (col_negatives, 0, weights[1])):
        own = logits.amax(axis)
        result.append(torch.logaddexp(lse, own) if lse.numel() else lse)
        if lse.numel():
            missing = torch.sigmoid(lse - own).unsqueeze(axis)
            gradient = gradient - weight * torch.where(pairs, missing, 0).sum(1)
    return *result, gradient.float(), weights


def floors(z, x, y, exact_dx, exact_dy, scale, largest, dtype):
    """What rounding alone may do to dx, dy and the derivative w.r.t. the scale."""
    rounding = SINGLE * (z.abs().max().item() + math.log(sum(z.shape)) + 1)
    share = scale * largest * (rounding + (epsilon(dtype) if dtype != torch.float32 else 0))
    dx, dy = share * y.double().norm().item(), share * x.double().norm().item()
    return (
        dx + epsilon(dtype) * exact_dx.norm().item(),
        dy + epsilon(dtype) * exact_dy.norm().item(),
        share / scale * x.double().norm().item() * y.double().norm().item(),
    )


def pair_of_features(m, n, dim, dtype, strided):
    x, y = features(max(m, n), dim, dtype, "cpu", strided=strided)
    return x[:m], y[:n]


COMPOSITIONS = {
    "m": st.sampled_from([1, 2, 31, 40, 64]),
    "n": st.sampled_from([1, 3, 33, 64, 90]),
    "dim": st.sampled_from([1, 7, 16, 33]),
    "dtype": st.sampled_from(DTYPES),
    "scale": st.sampled_from([1.0, 14.3, 100.0]),
    "offset": st.sampled_from([0, 2, -5, 40]),
    "chunk": st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4])),
    "strided": st.booleans(),
}
BLOCK = 32


@given(
    **COMPOSITIONS,
    directions=st.sampled_from([(True, True), (True, False), (False, True)]),
    upstream=st.sampled_from([1.0, 1e-5, -3.0, 0.0]),
)
@settings(max_examples=80)
def test_softmax_composition(
    passes, m, n, dim, dtype, scale, offset, chunk, strided, directions, upstream
):
    x, y = pair_of_features(m, n, dim, dtype, strided)
    scale = floats(scale)
    weights = upstream * floats(0.5 / m, 0.5 / n)
    used = weights * floats(*map(float, directions))
    eager = softmax_case(x, y, scale, offset, used, dtype)
    exact = softmax_case(x, y, scale, offset, used, torch.float64)
    with mock.patch.object(cuda, "_STATISTICS_BYTES", 4 * n * 10 * chunk[0]):
        found = cuda.statistics(x, y, scale, NOTHING, offset, *directions, BLOCK, BLOCK, 0)
    z = scale.double() * x.double() @ y.double().T
    rounding = SINGLE * (z.abs().max().item() + math.log(m + n))
    for index, (wanted, name) in enumerate(
        zip((*directions, True), ("rows", "cols", "positive"), strict=True)
    ):
        floor = rounding * math.sqrt(len(exact[index]))
        if wanted:
            assert_log_sum_exp(name, found[index], eager[index], exact[index], floor)
        else:
            assert found[index].shape == (0,)

    inputs = from_statistics(found, n, offset, weights)
    dx, dy, dscale = cuda.gradients(x, y, scale, *inputs, NOTHING, offset, BLOCK, BLOCK, 0, *chunk)
    assert (dx.dtype, dy.dtype, dscale.dtype) == (dtype, dtype, torch.float32)
    largest = weights.abs().max().item()
    limits = floors(z, x, y, exact[3], exact[4], scale.item(), largest, dtype)
    for name, ours, index in (("dx", dx, 3), ("dy", dy, 4), ("dscale", dscale, 5)):
        assert_as_accurate(name, ours, eager[index], exact[index], limits[index - 3])


def sigmoid_case(x, y, scale, bias, weight, offset, dtype):
    x, y = (t.to(dtype, copy=True).requires_grad_() for t in (x, y))
    real = torch.float64 if dtype == torch.float64 else torch.float32
    scale, bias = (t.to(real, copy=True).requires_grad_() for t in (scale, bias))
    z = (scale * (x @ y.T)).to(real) + bias
    sign = torch.where(cuda_passes.is_positive(z, offset), 1.0, -1.0)
    loss = -weight * torch.nn.functional.logsigmoid(sign * z).sum()
    loss.backward()
    return [t.detach() for t in (loss, x.grad, y.grad, scale.grad, bias.grad)]


@given(**COMPOSITIONS, bias=st.sampled_from([0.0, -10.0, 3.0]), gradients=st.booleans())
@settings(max_examples=80)
def test_sigmoid_composition(
    passes, m, n, dim, dtype, scale, offset, chunk, strided, bias, gradients
):
    x, y = pair_of_features(m, n, dim, dtype, strided)
    scale, bias, weight = floats(scale), floats(bias), 1.0 / m
    loss, dx, dy, dscale, dbias = cuda.sigmoid(
        x, y, scale, bias, weight, offset, gradients, BLOCK, BLOCK, *chunk
    )
    eager = sigmoid_case(x, y, scale, bias, weight, offset, dtype)
    exact = sigmoid_case(x, y, scale, bias, weight, offset, torch.float64)
    z = scale.double() * x.double() @ y.double().T + bias.double()
    rounding = SINGLE * (1 + z.abs().max().item())
    # exp(-20): torch's softplus, of the plain stand-in, is a straight line beyond 20.
    terms = (rounding + math.exp(-20)) * n * (1 + z.abs().max().item())
    assert_as_accurate("loss", loss, eager[0], exact[0], terms)
    assert_as_accurate("dbias", dbias, eager[4], exact[4], rounding * n)
    if not gradients:
        assert dx.shape == (0, dim) and dy.shape == (0, dim) and dscale.shape == ()
        return
    assert (dx.dtype, dy.dtype) == (dtype, dtype)
    limits = floors(z, x, y, exact[1], exact[2], scale.item(), weight * math.sqrt(m * n), dtype)
    for name, ours, index in (("dx", dx, 1), ("dy", dy, 2), ("dscale", dscale, 3)):
        assert_as_accurate(name, ours, eager[index], exact[index], limits[index - 1])


def test_float16_keeps_small_probabilities(passes):
    # At 1 / N^2 a stored float16 gradient without the factor would be zero.
    m = 64
    x, y = pair_of_features(m, m, 16, torch.float16, False)
    scale, weights = floats(1.0), floats(1e-7, 1e-7)
    found = cuda.statistics(x, y, scale, NOTHING, 0, True, True, BLOCK, BLOCK, 0)
    inputs = from_statistics(found, m, 0, weights)
    _, _, dscale = cuda.gradients(x, y, scale, *inputs, NOTHING, 0, BLOCK, BLOCK, 0, 2, 2)
    exact = softmax_case(x, y, scale, 0, weights, torch.float64)[5]
    assert abs(dscale.item() - exact.item()) <= epsilon(torch.float16) * abs(exact.item())


@pytest.mark.parametrize("target", [1e-8, 1e-5])
def test_fitted_pairs_are_relatively_exact(passes, target):
    # What is left is the rounding of logits of 100.
    m = 70
    (x, y), scale = well_fitted(m, 64, 100.0, 1.0, target), floats(100.0)
    weights = floats(0.5 / m, 0.5 / m)
    found = cuda.statistics(x, y, scale, NOTHING, 0, True, True, BLOCK, BLOCK, 0)
    loss = sum(pair_losses(lse, found[2]).mean() / 2 for lse in found[:2])
    inputs = from_statistics(found, m, 0, weights)
    ours = cuda.gradients(x, y, scale, *inputs, NOTHING, 0, BLOCK, BLOCK, 0, 1, 2)
    exact = softmax_case(x, y, scale, 0, weights, torch.float64)[3:]
    assert loss.item() == pytest.approx(
        contrastive_reference(x.double(), y.double(), 100.0).item(), rel=2e-5
    )
    for got, wanted in zip(ours, exact, strict=True):
        assert (got - wanted).norm() <= 2e-5 * wanted.norm()


def test_empty_sides(passes):
    x, y = torch.randn(3, 4), torch.randn(5, 4)
    none, scale, weights = torch.empty(0, 4), floats(1.0), floats(1.0, 1.0)
    rows, cols, positive = cuda.statistics(x, none, scale, NOTHING, 0, True, True, BLOCK, BLOCK, 0)
    assert (rows == -INF).all() and (positive == 0).all() and cols.shape == (0,)
    dx, dy, dscale = cuda.gradients(
        x, none, scale, rows, cols, positive, weights, NOTHING, 0, BLOCK, BLOCK, 0, 1, 1
    )
    assert (dx == 0).all() and dy.shape == (0, 4) and dscale == 0
    rows, cols, positive = cuda.statistics(none, y, scale, NOTHING, 0, True, True, BLOCK, BLOCK, 0)
    assert (cols == -INF).all() and rows.shape == positive.shape == (0,)
    dx, dy, dscale = cuda.gradients(
        none, y, scale, rows, cols, positive, weights, NOTHING, 0, BLOCK, BLOCK, 0, 1, 1
    )
    assert dx.shape == (0, 4) and (dy == 0).all() and dscale == 0


@pytest.mark.parametrize("target", [0.3, 1.0, 3.0])
def test_the_scale_gradient_is_as_exact_as_eager(passes, target):
    # At 100 the log-sum-exps' own rounding to float32 would be five times eager's error.
    m = 300
    (x, y), weights = well_fitted(m, 64, 100.0, 1.0, target), floats(0.5 / m, 0.5 / m)
    scale = floats(100.0)
    found = cuda.statistics(x, y, scale, NOTHING, 0, True, True, BLOCK, BLOCK, 0)
    inputs = from_statistics(found, m, 0, weights)
    ours = cuda.gradients(x, y, scale, *inputs, NOTHING, 0, BLOCK, BLOCK, 0, 4, 4)
    exact = softmax_case(x, y, scale, 0, weights, torch.float64)[3:]
    leaves = [t.clone().requires_grad_() for t in (x, y, scale)]
    eager_contrastive(*leaves, 0.0).backward()
    for name, *three in zip(("dx", "dy", "dscale"), ours, leaves, exact, strict=True):
        assert_as_accurate(name, three[0], three[1].grad, three[2])
