"""The attention kernels against the float64 definition: interpreted, or on a GPU."""

import math
from collections import defaultdict
from dataclasses import dataclass, replace
from unittest import mock

import pytest
import torch
from fastvlp_tests import fake_cuda, triton_process
from fastvlp_tests.tolerance import assert_as_accurate, epsilon
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlp.ops.cross_attention import cross_attention_reference
from fastvlp.ops.cross_attention.dropout import keep_mask

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# No tile holds more than 0 rows, interpreted or on any GPU: the path of long queries.
GENERAL = {"FUSED_INTERPRETED": (), "FUSED_TILES": defaultdict(tuple)}
PATHS = pytest.mark.parametrize("overrides", [{}, GENERAL], ids=["fused", "general"])
SEED = -(3 << 40) - 12345


@dataclass(frozen=True)
class Problem:
    """q, k, v, the gradient of the output, and the other arguments of the operator."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    grad: torch.Tensor
    cu_q: torch.Tensor
    cu_k: torch.Tensor | None
    key_mask: torch.Tensor | None = None
    causal: bool = False
    scale: float = 0.125
    dropout_p: float = 0.0

    @property
    def options(self) -> dict:
        longest_k = self.k.shape[1] if self.cu_k is None else int(self.cu_k.diff().max())
        return {
            "scale": self.scale, "dropout_p": self.dropout_p, "causal": self.causal,
            "max_seqlen_q": int(self.cu_q.diff().max()), "max_seqlen_k": longest_k,
        }  # fmt: skip

    @property
    def inputs(self) -> tuple:
        seed = torch.tensor([SEED], device=self.q.device)
        return self.q, self.k, self.v, self.cu_q, self.cu_k, self.key_mask, seed


def offsets(lengths, device, dtype=torch.int32):
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(dtype)


def rows(shape, dtype, device, generator, gap=0, width=1.0):
    """Normal numbers, last axis contiguous; `gap` leaves NaN between the rows in memory."""
    wide = torch.full((*shape[:-1], shape[-1] + gap), torch.nan, dtype=dtype)
    wide[..., : shape[-1]] = width * torch.randn(shape, generator=generator, dtype=torch.float64)
    return wide.to(device)[..., : shape[-1]]


def draw(
    queries, keys, device, *, heads=1, dim=32, dtype=torch.float32, packed=False, masked=False,
    gap=0, seed=0, **options,
):  # fmt: skip
    """`queries` rows per segment; `keys` of each segment where packed, else of all."""
    g = torch.Generator().manual_seed(seed)
    key_shape = (sum(keys),) if packed else (len(queries), keys)
    k, v = (rows((*key_shape, heads, dim), dtype, device, g, gap) for _ in range(2))
    q, grad = (rows((sum(queries), heads, dim), dtype, device, g, gap) for _ in range(2))
    mask = torch.rand(key_shape, generator=g).to(device) < 0.6 if masked else None
    return Problem(
        q, k, v, grad, offsets(queries, device), offsets(keys, device, torch.int64)
        if packed else None, mask, **options,
    )  # fmt: skip


def definition(problem, dtype):
    """Output and gradients by autograd through the reference, at `dtype`."""
    q, k, v = (t.detach().to(dtype).requires_grad_() for t in (problem.q, problem.k, problem.v))
    out = cross_attention_reference(
        q, k, v, problem.cu_q, problem.cu_k, key_mask=problem.key_mask, causal=problem.causal,
        scale=problem.scale, dropout_p=problem.dropout_p, dropout_seed=SEED,
    )  # fmt: skip
    out.backward(problem.grad.to(dtype))
    return [out.detach()] + [torch.zeros_like(t) if t.grad is None else t.grad for t in (q, k, v)]


def run(run_kernel_with, problem, overrides):
    out, statistics = run_kernel_with(
        {}, "cross_attention.forward", "cross_attention_forward", *problem.inputs, **problem.options
    )
    q, k, v, *rest = problem.inputs
    gradients = run_kernel_with(
        overrides, "cross_attention.backward", "cross_attention_backward",
        problem.grad, q, k, v, out, statistics, *rest, **problem.options,
    )  # fmt: skip
    return [out, *gradients], statistics


def rounding(problem, out):
    """What rounding costs where terms cancel to less than their size; `out` is the exact output.

    Logits and sums are float32; dS is a difference from dO * O, of which O has the dtype of q.
    """
    tensors = (problem.q, problem.k, problem.v, problem.grad)
    q, k, v, grad = (torch.nan_to_num(t.double()).norm(dim=-1) for t in tensors)
    largest_q, largest_k, largest_v = (t.max().item() if t.numel() else 0.0 for t in (q, k, v))
    unit = epsilon(torch.float32) * (1 + problem.scale * largest_q * largest_k)
    terms = unit * grad.norm().item() * largest_v
    terms += epsilon(problem.q.dtype) * (problem.grad.double() * out).norm().item()
    return {
        "out": unit * v.norm().item(),
        "dv": unit * grad.norm().item(),
        "dq": terms * problem.scale * largest_k,
        "dk": terms * problem.scale * largest_q,
    }


def check(run_kernel_with, problem, overrides):
    ours, statistics = run(run_kernel_with, problem, overrides)
    exact, eager = definition(problem, torch.float64), definition(problem, problem.q.dtype)
    cancelled = rounding(problem, exact[0])
    for name, our, near, true in zip(("out", "dq", "dk", "dv"), ours, eager, exact, strict=True):
        assert our.dtype == problem.q.dtype
        floor = epsilon(our.dtype) * true.norm().item() + cancelled[name]
        assert_as_accurate(name, our, near, true, floor)
    return ours, statistics


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [32, 64, 80, 88, 96, 104, 128])
def test_head_widths(run_kernel_with, device, dim, dtype):
    check(run_kernel_with, draw([30], 50, device, heads=2, dim=dim, dtype=dtype), {})


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
    fused, general = ["query_gradient_kernel"], ["query_gradient_kernel", "key_gradient_kernel"]
    assert backward_kernels({}) == fused
    assert backward_kernels(GENERAL) == general


def check_coarse_logits(run_kernel_with, device, dtype, size, scale, overrides):
    """Logits of about `size`, of which the largest comes twice: its weights are halves."""
    problem = draw([40, 3], 90, device, heads=2, dtype=dtype, masked=True, scale=scale)
    norm = (size / 32**0.5) ** 0.5
    for t, factor in ((problem.q, norm), (problem.k, norm), (problem.v, 1e-2)):
        t *= factor
    problem.k[:, 45:] = problem.k[:, :45]  # the largest logit comes twice, or once where masked
    ours, _ = run(run_kernel_with, problem, overrides)
    exact, eager = definition(problem, torch.float64), definition(problem, dtype)
    q, k, v = (t.double().norm(dim=-1).max() for t in (problem.q, problem.k, problem.v))
    # Gradients of logits are differences of terms of this size.
    terms = epsilon(dtype) * problem.grad.double().norm() * v
    floors = 0.0, terms * k, terms * q, 0.0
    for name, *three, floor in zip(("out", "dq", "dk", "dv"), ours, eager, exact, floors,
                                   strict=True):  # fmt: skip
        assert_as_accurate(name, *three, epsilon(dtype) * three[2].norm().item() + float(floor))


@PATHS
def test_causal_self_attention_of_packed_text(run_kernel_with, device, overrides):
    lengths = [40, 1, 0, 77]
    problem = draw(lengths, lengths, device, heads=2, packed=True, causal=True, dropout_p=0.1)
    check(run_kernel_with, problem, overrides)


@PATHS
def test_more_causal_queries_than_keys(run_kernel_with, device, overrides):
    problem = draw([50, 9], [20, 40], device, packed=True, causal=True)
    (out, dq, _, _), statistics = check(run_kernel_with, problem, overrides)
    assert not out[:30].any() and not dq[:30].any() and sees_nothing(statistics[..., :30])


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
    assert sees_nothing(statistics[..., 35:39])
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


def sees_nothing(statistics):
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
        assert out.shape == problem.q.shape and not out.any() and sees_nothing(statistics)


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
