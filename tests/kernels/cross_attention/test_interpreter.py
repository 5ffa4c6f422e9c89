"""The attention kernels against the float64 definition: interpreted, or on a GPU."""

import math
from collections import defaultdict
from dataclasses import replace
from unittest import mock

import pytest
import torch
from fastvlp_tests import fake_cuda, triton_process
from fastvlp_tests.attention_kernels import (
    SEED,
    Problem,
    check,
    check_coarse_logits,
    draw,
    offsets,
    rows,
    run,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlp.ops.cross_attention.dropout import keep_mask

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# No tile holds more than 0 rows, interpreted or on any GPU: the path of long queries.
GENERAL = {"FUSED_INTERPRETED": (), "FUSED_TILES": defaultdict(tuple)}
PATHS = pytest.mark.parametrize("overrides", [{}, GENERAL], ids=["fused", "general"])


@PATHS
@settings(max_examples=12)
@given(
    queries=st.lists(st.sampled_from([0, 1, 5, 31, 33, 70]), min_size=1, max_size=3),
    keys=st.lists(st.sampled_from([0, 1, 16, 33, 65]), min_size=3, max_size=3),
    packed=st.booleans(),
    masked=st.booleans(),
    causal=st.booleans(),
    heads=st.sampled_from([1, 2]),
    dim=st.sampled_from([8, 32, 40]),
    dropout_p=st.sampled_from([0.0, 0.3]),
    dtype=st.sampled_from(DTYPES),
    gap=st.sampled_from([0, 3, 16]),
    seed=st.integers(0, 3),
)
def test_against_the_definition(run_kernel_with, device, overrides, queries, keys, packed, **drawn):
    keys = keys[: len(queries)] if packed else keys[0]
    check(run_kernel_with, draw(queries, keys, device, packed=packed, **drawn), overrides)


@pytest.mark.parametrize("queries", [1, 30, 128, 129, 300])
@pytest.mark.parametrize("keys", [1, 33, 197, 577])
def test_sizes(run_kernel_with, device, queries, keys):
    check(run_kernel_with, draw([queries], keys, device, masked=True), {})


@PATHS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [32, 64, 72, 80, 88, 96, 104, 128])
def test_head_widths(run_kernel_with, device, overrides, dim, dtype):
    check(run_kernel_with, draw([30, 70], 50, device, heads=2, dim=dim, dtype=dtype), overrides)


def test_heads_wider_than_a_tile_keep_their_gaps(run_kernel_with, device):
    """Two tiles hold a head of 72: what lies behind its last element is not a part of it."""
    problem = draw([30, 70], 50, device, heads=2, dim=72, dropout_p=0.3, masked=True, gap=9)
    check(run_kernel_with, problem, {})


def backward_kernels(overrides) -> list[str]:
    """Names of the kernels of a backward pass on a GPU that its segments fill."""
    names = []

    def run(kernel, *_, **__):
        names.append(kernel.__name__)

    with fake_cuda.gpu(), mock.patch("triton.runtime.jit.JITFunction.run", run):
        q, k = (fake_cuda.floats(*shape, 4, 16) for shape in ((400,), (40, 20)))
        statistics = fake_cuda.floats(2, 4, 400, dtype=torch.float32)
        triton_process.call_with(
            overrides, "cross_attention.backward", "cross_attention_backward",
            q, q, k, k, q, statistics, fake_cuda.integers(41), None, None, fake_cuda.integers(1),
            scale=1.0, dropout_p=0.0, causal=False, max_seqlen_q=30, max_seqlen_k=20,
        )  # fmt: skip
    return names


def test_each_path_runs_on_a_gpu_too():
    fused, general = ["fused_gradient_kernel"], ["query_gradient_kernel", "key_gradient_kernel"]
    assert backward_kernels({}) == fused
    assert backward_kernels(GENERAL) == general


@PATHS
def test_causal_self_attention_of_packed_text(run_kernel_with, device, overrides):
    lengths = [40, 1, 0, 77]
    problem = draw(lengths, lengths, device, heads=2, packed=True, causal=True, dropout_p=0.1)
    check(run_kernel_with, problem, overrides)


@PATHS
def test_more_causal_queries_than_keys(run_kernel_with, device, overrides):
    problem = draw([50, 9], [20, 40], device, packed=True, causal=True)
    (out, dq, _, _), statistics = check(run_kernel_with, problem, overrides)
    assert not out[:30].any() and not dq[:30].any() and attends_nothing(statistics[..., :30])


@PATHS
@pytest.mark.parametrize("queries", [[40, 0, 8], [0, 0]])
def test_segments_without_queries(run_kernel_with, device, overrides, queries):
    problem = draw(queries, 40, device, heads=2)
    for t in (problem.k, problem.v):  # their keys may hold anything
        t[1] = torch.nan
    _, _, dk, dv = run(run_kernel_with, problem, overrides)[0]
    assert not dk[1].any() and not dv[1].any()
    if queries[1:] == [0]:
        assert not dk.any() and not dv.any()


@PATHS
@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_keys_are_not_read(run_kernel_with, device, overrides, dtype):
    problem = draw([35, 4, 20], 70, device, heads=2, dtype=dtype, masked=True, dropout_p=0.2)
    mask = problem.key_mask
    mask[1] = False
    clean, _ = check(run_kernel_with, problem, overrides)
    for bad in (torch.nan, torch.inf):
        k, v = (t.clone() for t in (problem.k, problem.v))
        k[~mask], v[~mask] = bad, -bad
        dirty, statistics = run(run_kernel_with, replace(problem, k=k, v=v), overrides)
        assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    out, dq, dk, dv = dirty
    assert attends_nothing(statistics[..., 35:39])
    assert not out[35:39].any() and not dq[35:39].any()
    assert not dk[~mask].any() and not dv[~mask].any()


@PATHS
def test_a_query_that_is_not_a_number_spares_masked_keys(run_kernel_with, device, overrides):
    problem = draw([35], 40, device, masked=True)
    problem.q[3] = torch.nan
    out, dq, dk, dv = run(run_kernel_with, problem, overrides)[0]
    assert out[3].isnan().all() and dq[3].isnan().all()
    others = torch.arange(35, device=device) != 3
    assert torch.isfinite(out[others]).all() and torch.isfinite(dq[others]).all()
    masked = ~problem.key_mask
    assert not dk[masked].any() and not dv[masked].any()


@PATHS
def test_views_of_fused_projections(run_kernel_with, device, overrides):
    g = torch.Generator().manual_seed(0)
    q = rows((45, 2, 64), torch.float16, device, g)[..., 32:]
    kv = rows((70, 3, 2, 2, 32), torch.float16, device, g)  # [L, n, (k, v), H, d]
    k, v = kv.transpose(0, 1).unbind(2)
    grad = rows((2, 45, 32), torch.float16, device, g).transpose(0, 1)
    problem = Problem(q, k, v, grad, offsets([30, 0, 15], device), None)
    check(run_kernel_with, problem, overrides)
    grad = grad[:1, :1].expand(45, 2, 32)[..., :1].expand(45, 2, 32)  # of a sum: stride 0
    check(run_kernel_with, replace(problem, grad=grad), overrides)


@PATHS
def test_dropout_drops_what_the_definition_drops(run_kernel_with, device, overrides):
    # Uniform weights and the unit matrix as values: the output is the mask, divided by the keys.
    lengths, keys, heads, p = [7, 35], 32, 2, 0.4
    problem = draw(lengths, keys, device, heads=heads, dim=keys, dropout_p=p)
    v = torch.eye(keys, device=device)[None, :, None].expand(2, keys, heads, keys)
    problem = replace(problem, q=torch.zeros_like(problem.q), v=v)
    (out, _, _, dv), _ = check(run_kernel_with, problem, overrides)
    keep = keep_mask(SEED, torch.arange(42, device=device), heads, keys, p)
    assert torch.equal(out != 0, keep.transpose(0, 1))
    unit = replace(problem, grad=torch.ones_like(problem.grad))
    dv = run(run_kernel_with, unit, overrides)[0][3][..., 0]  # its sums over the rows
    counts = torch.stack([part.sum(1) for part in keep.split(lengths, 1)])
    torch.testing.assert_close(dv, counts.transpose(1, 2) / keys / (1 - p))


@PATHS
def test_large_logits(run_kernel_with, device, overrides):
    check(run_kernel_with, draw([20], 90, device, dim=64, scale=8.0), overrides)


@PATHS
def test_the_same_bits_twice(run_kernel_with, device, overrides):
    problem = draw([40, 20], 70, device, heads=2, dtype=torch.bfloat16, dropout_p=0.1)
    first, second = (run(run_kernel_with, problem, overrides)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@PATHS
@pytest.mark.parametrize("dtype, size", [
    (torch.float32, 1e6), (torch.float32, 1e10), (torch.float32, 1e30), (torch.bfloat16, 1e10),
    (torch.float16, 1e9),
])  # fmt: skip
@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_logits_that_floats_hold_coarsely(run_kernel_with, device, overrides, dtype, size, scale):
    check_coarse_logits(run_kernel_with, device, dtype, size, scale, overrides)


def attends_nothing(statistics):
    largest, log_total = statistics
    return not largest.any() and (log_total == torch.inf).all()


@pytest.mark.parametrize("scale", [0.125, -0.125])
def test_statistics(run_kernel_with, device, scale):
    problem = draw([40], 70, device, heads=2, masked=True, scale=scale)
    largest, log_total = run(run_kernel_with, problem, {})[1]
    lse = abs(scale) * largest.double() + math.log(2) * log_total.double()
    logits = problem.scale * torch.einsum("qhd,khd->hqk", problem.q, problem.k[0]).double()
    exact = logits[..., problem.key_mask[0]].logsumexp(-1)
    torch.testing.assert_close(lse, exact, rtol=1e-6, atol=1e-6)


def test_no_segments_and_no_keys(run_kernel_with, device):
    for queries, keys in (([], 5), ([3], 0)):
        problem = draw(queries, keys, device)
        options = problem.options | {"max_seqlen_q": 3} if queries else {}
        if not queries:
            options = {
                "scale": 1.0, "dropout_p": 0.0, "causal": False, "max_seqlen_q": 0,
                "max_seqlen_k": 5,
            }  # fmt: skip
        out, statistics = run_kernel_with(
            {}, "cross_attention.forward", "cross_attention_forward", *problem.inputs, **options
        )
        assert out.shape == problem.q.shape and not out.any() and attends_nothing(statistics)


def test_unusable_arguments_say_why(run_kernel_with, device):
    problem = draw([4], 4, device, heads=2)

    def refuse(match, **changes):
        changed = replace(problem, **changes)
        with pytest.raises(ValueError, match=match):
            run_kernel_with(
                {}, "cross_attention.forward", "cross_attention_forward", *changed.inputs,
                **problem.options,
            )  # fmt: skip

    refuse("one dtype is needed", k=problem.k.half())
    refuse("float64 has no kernel", **{n: getattr(problem, n).double() for n in "qkv"})
    refuse("the last axis of q is not contiguous", q=problem.q.mT.contiguous().mT)
    refuse("key_mask must have shape", key_mask=torch.ones(2, 4, dtype=torch.bool, device=device))
    refuse("k must be .n, L, H, d.", cu_k=problem.cu_q)
    wide = draw([4], 4, device, dim=136)
    refuse("heads 136 wide have no kernel", q=wide.q, k=wide.k, v=wide.v)
