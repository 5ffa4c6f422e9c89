"""The per-element maths of csrc/common, compiled for the host, against float64.

The CUDA kernels run these same lines. An error may be twice that of the same formula in eager
float32 PyTorch, plus one unit in the last place.
"""

import ctypes
import math

import numpy as np
import pytest
import torch
from fastvlp_tests.cuda_passes import CSRC, compile_library
from hypothesis import given
from hypothesis import strategies as st

WRAPPERS = """
#include "contrastive_math.h"
#include <cstdint>
using namespace fastvlp;
extern "C" {
void run_merge(int64_t n, const float* a_max, const float* a_sum, const float* b_max,
               const float* b_sum, float* max, float* sum) {
  for (int64_t i = 0; i < n; ++i) {
    const LsePair p = merge({a_max[i], a_sum[i]}, {b_max[i], b_sum[i]});
    max[i] = p.max, sum[i] = p.sum;
  }
}
void run_log_sum_exp(int64_t n, const float* max, const float* sum, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = log_sum_exp({max[i], sum[i]});
}
void run_softmax_logit_gradient(int64_t n, const float* z, const float* row_lse,
                                const float* col_lse, const float* row_weight,
                                const float* col_weight, float* out) {
  for (int64_t i = 0; i < n; ++i)
    out[i] = softmax_logit_gradient(z[i], row_lse[i], col_lse[i], row_weight[i], col_weight[i]);
}
#define UNARY(f) void run_##f(int64_t n, const float* z, float* out) { \\
  for (int64_t i = 0; i < n; ++i) out[i] = f(z[i]); }
UNARY(exponent_reference) UNARY(softplus) UNARY(sigmoid)
#define PAIRED(f) void run_##f(int64_t n, const float* z, const float* positive, float* out) { \\
  for (int64_t i = 0; i < n; ++i) out[i] = f(z[i], positive[i] != 0.0f); }
PAIRED(sigmoid_loss) PAIRED(sigmoid_logit_gradient)
}
"""
INF, NAN = math.inf, math.nan
LOGITS = st.one_of(
    st.floats(-30, 30, width=32),
    st.floats(-200, 200, width=32),
    st.floats(-(2.0**100), 2.0**100, width=32),
    st.sampled_from([0.0, -0.0, 1e-30, -1e-30, 88.7, -87.3, -103.9]),
)
SUMS = st.floats(1.0, 65536.0, width=32)


@pytest.fixture(scope="module")
def maths(tmp_path_factory):
    """Calls a function of the header on float32 arrays: maths(name, *inputs, outputs=1)."""
    folder = tmp_path_factory.mktemp("contrastive_math")
    library = compile_library(WRAPPERS, folder, f"-I{CSRC / 'common'}", "-ffp-contract=fast")

    def call(name, *inputs, outputs=1):
        arrays = [np.ascontiguousarray(np.atleast_1d(a), dtype=np.float32) for a in inputs]
        results = [np.empty_like(arrays[0]) for _ in range(outputs)]
        pointers = [a.ctypes.data_as(ctypes.c_void_p) for a in (*arrays, *results)]
        getattr(library, f"run_{name}")(ctypes.c_int64(arrays[0].size), *pointers)
        return results[0] if outputs == 1 else results

    return call


def ulps(values, exact):
    """Largest distance from `exact` (float64) in float32 units in its last place."""
    exact = np.asarray(exact)
    unit = np.spacing(np.maximum(np.abs(exact), np.finfo(np.float32).tiny).astype(np.float32))
    return (np.abs(np.asarray(values, dtype=np.float64) - exact) / unit).max()


def assert_close(ours, eager, exact):
    assert np.isfinite(ours).all()
    allowed = 2 * ulps(eager.double().numpy(), exact.numpy()) + 1
    assert ulps(ours, exact.numpy()) <= allowed


def tensors(*values):
    """Each as float32 and as the same numbers in float64."""
    single = [torch.tensor(v, dtype=torch.float32) for v in values]
    return single, [t.double() for t in single]


def merged(a_max, a_sum, b_max, b_sum):
    largest = torch.maximum(a_max, b_max)
    return largest, a_sum * (a_max - largest).exp() + b_sum * (b_max - largest).exp()


@given(pairs=st.lists(st.tuples(LOGITS, SUMS, LOGITS, SUMS), min_size=1, max_size=20))
def test_merge(maths, pairs):
    single, double = tensors(*zip(*pairs, strict=True))
    largest, total = maths("merge", *single, outputs=2)
    exact_largest, exact_total = merged(*double)
    assert (largest == exact_largest.numpy()).all()
    assert_close(total, merged(*single)[1], exact_total)
    a_max, a_sum, b_max, b_sum = single
    swapped = maths("merge", b_max, b_sum, a_max, a_sum, outputs=2)
    assert (swapped[0] == largest).all() and (swapped[1] == total).all()


@given(pair=st.tuples(LOGITS, SUMS))
def test_empty_pair_changes_nothing(maths, pair):
    for inputs in ((*pair, -INF, 0.0), (-INF, 0.0, *pair)):
        largest, total = maths("merge", *inputs, outputs=2)
        assert largest[0] == np.float32(pair[0]) and total[0] == np.float32(pair[1])
    empty = maths("merge", -INF, 0.0, -INF, 0.0, outputs=2)
    assert maths("log_sum_exp", *empty)[0] == -INF


@given(pair=st.tuples(LOGITS, SUMS))
def test_nan_stays(maths, pair):
    for broken in ((NAN, NAN), (-INF, NAN), (1.0, NAN)):
        for inputs in ((*pair, *broken), (*broken, *pair)):
            assert np.isnan(maths("merge", *inputs, outputs=2)[1][0])
    assert np.isnan(maths("softplus", NAN)[0]) and np.isnan(maths("sigmoid", NAN)[0])
    for positive in (0.0, 1.0):
        assert np.isnan(maths("sigmoid_loss", NAN, positive)[0])
        assert np.isnan(maths("sigmoid_logit_gradient", NAN, positive)[0])
    assert np.isnan(maths("softmax_logit_gradient", NAN, 0.0, 0.0, 1.0, 0.0)[0])
    assert np.isnan(maths("softmax_logit_gradient", 0.0, 0.0, 0.0, NAN, 0.0)[0])
    assert np.isnan(maths("exponent_reference", NAN)[0])


@given(values=st.lists(LOGITS, min_size=1, max_size=40))
def test_log_sum_exp_of_merged_elements(maths, values):
    single, double = tensors(values)
    total = (-INF, 0.0)
    for value in values:
        total = [part[0] for part in maths("merge", *total, value, 1.0, outputs=2)]
    ours = maths("log_sum_exp", *total)
    eager = single[0].logsumexp(0, keepdim=True)
    # Each merge may round once more than the eager sum does.
    allowed = 2 * ulps(eager.double().numpy(), double[0].logsumexp(0).numpy()) + len(values)
    assert ulps(ours, double[0].logsumexp(0).numpy()) <= allowed


def test_exponent_reference(maths):
    finite = [0.0, -3.0, 1e30]
    assert (maths("exponent_reference", finite) == np.float32(finite)).all()
    assert maths("exponent_reference", -INF)[0] == 0.0
    assert maths("exponent_reference", INF)[0] == INF


@given(
    elements=st.lists(
        st.tuples(
            st.floats(-100, 100, width=32),
            st.floats(0, 120, width=32),
            st.floats(0, 120, width=32),
            st.floats(-2, 2, width=32),
            st.floats(0, 2, width=32),
        ),
        min_size=1,
        max_size=20,
    )
)
def test_softmax_logit_gradient(maths, elements):
    def formula(z, row_lse, col_lse, row_weight, col_weight):
        row, col = row_weight * (z - row_lse).exp(), col_weight * (z - col_lse).exp()
        return row + col, row.abs() + col.abs()

    z, above_row, above_col, row_weight, col_weight = zip(*elements, strict=True)
    single, _ = tensors(z, above_row, above_col, row_weight, col_weight)
    single[1], single[2] = single[0] + single[1], single[0] + single[2]
    ours = maths("softmax_logit_gradient", *single)
    exact, size = formula(*(t.double() for t in single))
    # Two shares of opposite sign cancel: their size, not that of the sum, is what rounds.
    unit = np.spacing(np.maximum(size.numpy(), np.finfo(np.float32).tiny).astype(np.float32))
    eager = np.abs(formula(*single)[0].double().numpy() - exact.numpy()) / unit
    error = np.abs(ours.astype(np.float64) - exact.numpy()) / unit
    assert np.isfinite(ours).all() and error.max() <= 2 * eager.max() + 1


def test_softmax_weight_of_zero_leaves_its_term_out(maths):
    assert maths("softmax_logit_gradient", 1.0, 1.0, NAN, 0.5, 0.0)[0] == 0.5
    assert maths("softmax_logit_gradient", 1.0, -INF, 1.0, 0.0, 0.25)[0] == 0.25
    assert maths("softmax_logit_gradient", -INF, 1.0, 1.0, 0.5, 0.5)[0] == 0.0


@given(z=st.lists(LOGITS, min_size=1, max_size=40))
def test_softplus_and_sigmoid(maths, z):
    single, double = (group[0] for group in tensors(z))
    # log1p and expm1 forms: torch's own float64 softplus is a straight line beyond its threshold.
    softplus = double.clamp(min=0) + (-double.abs()).exp().log1p()
    eager = single.clamp(min=0) + (-single.abs()).exp().log1p()
    assert_close(maths("softplus", single), eager, softplus)
    assert_close(maths("sigmoid", single), single.sigmoid(), double.sigmoid())


@given(z=st.lists(LOGITS, min_size=1, max_size=40), positive=st.booleans())
def test_sigmoid_loss_and_gradient(maths, z, positive):
    single, double = (group[0] for group in tensors(z))
    sign = 1 if positive else -1

    def loss(t):
        u = -sign * t
        return u.clamp(min=0) + (-u.abs()).exp().log1p()

    flags = [float(positive)] * len(z)
    assert_close(maths("sigmoid_loss", single, flags), loss(single), loss(double))
    gradient = maths("sigmoid_logit_gradient", single, flags)
    assert_close(gradient, -sign * (-sign * single).sigmoid(), -sign * (-sign * double).sigmoid())


def test_infinite_logits(maths):
    infinite = [INF, -INF]
    assert maths("softplus", infinite).tolist() == [INF, 0.0]
    assert maths("sigmoid", infinite).tolist() == [1.0, 0.0]
    assert maths("sigmoid_loss", infinite, [1.0, 1.0]).tolist() == [0.0, INF]
    assert maths("sigmoid_logit_gradient", infinite, [1.0, 1.0]).tolist() == [0.0, -1.0]
    assert maths("sigmoid_logit_gradient", infinite, [0.0, 0.0]).tolist() == [1.0, 0.0]
