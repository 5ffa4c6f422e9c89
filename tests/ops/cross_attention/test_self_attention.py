"""The towers' attention against float64, whichever kernel runs, and the choice between them."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from fastvlp_tests.leaves import with_gradients
from fastvlp_tests.tolerance import assert_as_accurate, epsilon
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from fastvlp.nn import attention, attention_reference
from fastvlp.ops import explain

module = sys.modules["fastvlp.ops.cross_attention.self_attention"]
HALF = [torch.bfloat16, torch.float16]


def check(qkv, upstream, **kwargs):
    """Output and gradients against float64, at most twice the error of plain matmuls."""
    dtype, head_dim = qkv[0].dtype, qkv[0].shape[-1]
    ours = with_gradients(lambda *a: attention(*a, **kwargs), qkv, upstream)
    eager = with_gradients(lambda *a: attention_reference(*a, **kwargs), qkv, upstream)
    wide = [t.double() for t in qkv]
    exact = with_gradients(lambda *a: attention_reference(*a, **kwargs), wide, upstream)
    q, k, v = wide
    # Gradients of the logits are differences of these, so their rounding stays where all cancel.
    along = torch.einsum("bqhd,bkhd->bhqk", upstream.double(), v)
    delta = along.abs().max() * head_dim**-0.5
    size = {"dq": delta * k.abs().max(), "dk": delta * q.abs().max()}
    # The rounding of a logit is a relative error of its exponential.
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * kwargs.get("scale", head_dim**-0.5)
    rounding = epsilon(dtype) + epsilon(torch.float32) * logits.abs().max().item()
    for name, o, e, x in zip(("out", "dq", "dk", "dv"), ours, eager, exact, strict=True):
        assert o.dtype == dtype
        largest = max(x.abs().max(), size.get(name, 0)).item()
        assert_as_accurate(name, o, e, x, floor=rounding * largest * x.numel() ** 0.5)


@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    length=st.integers(1, 40),
    head_dim=st.sampled_from([1, 8, 64, 80]),
    causal=st.booleans(),
    masked=st.booleans(),
    dtype=st.sampled_from([torch.float32, *HALF]),
    scale=st.sampled_from([0.1, 1.0, 8.0]),
    seed=st.integers(0, 99),
)
def test_matches_float64(
    device, batch, heads, length, head_dim, causal, masked, dtype, scale, seed
):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, length, 4, heads, head_dim)  # views of a joint projection
    sampled = (scale * torch.randn(shape, generator=generator)).to(dtype).to(device)
    *qkv, upstream = sampled.unbind(2)
    mask = None
    if masked:
        mask = (torch.rand(batch, length, generator=generator) > 0.4).to(device)
    check(qkv, upstream, causal=causal, key_mask=mask)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [197, 257, 400])
def test_lengths_of_the_towers(device, dtype, causal, length):
    torch.manual_seed(0)
    *qkv, upstream = torch.randn(4, 2, length, 2, 64, device=device).to(dtype)
    check(qkv, upstream, causal=causal, scale=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("causal", [False, True])
def test_masked_keys(device, dtype, causal):
    """Holes, no key at all, and NaN in keys that nobody sees."""
    torch.manual_seed(0)
    *qkv, upstream = torch.randn(4, 3, 6, 2, 8, dtype=dtype, device=device)
    mask = torch.ones(3, 6, dtype=torch.bool, device=device)
    mask[0, 2], mask[1], mask[2, 0] = False, False, False
    for x in qkv[1:]:
        x[~mask] = torch.nan
    out, dq, dk, dv = with_gradients(
        lambda *a: attention(*a, causal=causal, key_mask=mask), qkv, upstream
    )
    for i in range(3):
        for row in range(6):
            attended = mask[i] & (torch.arange(6, device=device) <= row if causal else True)
            q, k, v = qkv[0][i, row], qkv[1][i, attended], qkv[2][i, attended]
            weights = (torch.einsum("hd,khd->hk", q, k) * 8**-0.5).softmax(-1)
            wanted = torch.einsum("hk,khd->hd", weights, v)
            bound = 32 * epsilon(dtype)
            torch.testing.assert_close(out[i, row], wanted, rtol=bound, atol=bound)
    assert dq.isfinite().all()
    for gradient in (dk, dv):
        assert (gradient[~mask] == 0).all() and gradient.isfinite().all()


@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(causal):
    torch.manual_seed(0)
    qkv = torch.randn(3, 2, 4, 2, 3, dtype=torch.float64).requires_grad_()
    mask = torch.tensor([[True, False, True, True], [True] * 4])
    assert torch.autograd.gradcheck(
        lambda x: attention_reference(*x, causal=causal, key_mask=mask), qkv
    )


def test_more_queries_than_keys(device):
    torch.manual_seed(0)
    q, upstream = torch.randn(2, 2, 5, 2, 8, device=device)
    k, v = torch.randn(2, 2, 3, 2, 8, device=device)
    check((q, k, v), upstream)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_without_a_break(device, dtype):
    def step(q, k, v):
        return attention(q, k, v, causal=True)

    torch.manual_seed(0)
    *qkv, upstream = torch.randn(4, 2, 5, 2, 8, device=device).to(dtype)
    plain = with_gradients(step, qkv, upstream)
    compiled = with_gradients(torch.compile(step, fullgraph=True), qkv, upstream)
    for one, other in zip(plain, compiled, strict=True):
        torch.testing.assert_close(one, other)


# --- which one runs ---


def sample(dtype=torch.bfloat16, length=5, head_dim=8, device="cpu", requires_grad=True):
    return [
        torch.randn(2, length, 2, head_dim, device=device).to(dtype).requires_grad_(requires_grad)
        for _ in range(3)
    ]


def test_on_the_cpu():
    for dtype in (torch.float32, *HALF):
        chosen = explain("attention", *sample(dtype))
        assert chosen.chosen == "native"
        assert "CUDA" in chosen.reasons["flash_attn"][0] and "CUDA" in chosen.reasons["xformers"][0]
    chosen = explain("attention", *sample(torch.float64))
    assert chosen.chosen == "sdpa"
    assert "float64 has no kernel" in chosen.reasons["native"][0]


def test_forced(monkeypatch):
    q, k, v = sample(torch.float32)
    monkeypatch.setenv("FASTVLP_BACKEND", "reference")  # is for the operators
    explanation = explain("attention", q, k, v)
    assert explanation.chosen == "sdpa"
    assert "FASTVLP_BACKEND" in explanation.reasons["native"][0]
    monkeypatch.delenv("FASTVLP_BACKEND")
    monkeypatch.setenv("FASTVLP_ATTENTION", "sdpa")
    explanation = explain("attention", q, k, v)
    assert explanation.chosen == "sdpa"
    assert explanation.reasons["native"] == ["FASTVLP_ATTENTION=sdpa asks for another"]
    monkeypatch.setenv("FASTVLP_ATTENTION", "flash_attn")
    with pytest.raises(RuntimeError, match="flash_attn runs on CUDA"):
        attention(q, k, v)
    monkeypatch.setenv("FASTVLP_ATTENTION", "fast")
    with pytest.raises(ValueError, match="FASTVLP_ATTENTION: expected one of flash_attn.*'fast'"):
        attention(q, k, v)


class FlashAttn(types.ModuleType):
    """flash_attn's function with its argument names and conditions, computed by SDPA."""

    def __init__(self):
        super().__init__("flash_attn")
        self.calls = []

    def flash_attn_func(
        self, q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
        softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        assert q.dtype in HALF and q.dim() == 4 and q.shape[-1] <= 256
        assert dropout_p == 0 and window_size == (-1, -1) and not return_attn_probs
        self.calls.append({"causal": causal, "deterministic": deterministic})
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=softmax_scale)
        return out.transpose(1, 2)


class XformersOps(types.ModuleType):
    """xformers.ops likewise; causality is a bias object there."""

    class LowerTriangularMask:
        pass

    def __init__(self):
        super().__init__("xformers.ops")
        self.calls = []

    def memory_efficient_attention(
        self, query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
    ):
        assert query.dtype in HALF and query.dim() == 4 and p == 0
        assert attn_bias is None or type(attn_bias) is self.LowerTriangularMask
        causal = attn_bias is not None
        self.calls.append({"causal": causal})
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
        return out.transpose(1, 2)


@pytest.fixture
def packages(monkeypatch):
    """Both packages as if installed."""
    fakes = {"flash_attn": FlashAttn(), "xformers": types.ModuleType("xformers")}
    fakes["xformers.ops"] = fakes["xformers"].ops = XformersOps()
    for name, fake in fakes.items():
        monkeypatch.setitem(sys.modules, name, fake)
    module._import.cache_clear()
    yield {"flash_attn": fakes["flash_attn"], "xformers": fakes["xformers.ops"]}
    module._import.cache_clear()


@pytest.mark.parametrize("package", ["flash_attn", "xformers"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_call_of_a_package(packages, package, causal, scale):
    q, k, v = sample()
    out = module._BACKENDS[package](q, k, v, None, causal, scale)
    wanted = module._BACKENDS["sdpa"](q, k, v, None, causal, scale)
    assert torch.equal(out, wanted)
    assert [call["causal"] for call in packages[package].calls] == [causal]


def on_gpu(monkeypatch, capability, *args, deterministic=False, key_mask=False, **kwargs):
    """Explanation for tensors on a GPU of that capability, which run through without values."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (capability, 0))
    torch.use_deterministic_algorithms(deterministic)
    with FakeTensorMode():
        qkv = [torch.empty(2, 5, 2, 8, device="cuda", **{"dtype": HALF[0], **kwargs})] * 3
        mask = torch.empty(2, 5, dtype=torch.bool, device="cuda") if key_mask else None
        explanation = explain("attention", *qkv, key_mask=mask)
        assert attention(*qkv, key_mask=mask).shape == qkv[0].shape
    return explanation


@pytest.mark.parametrize(
    "capability, kwargs, chosen",
    [
        (7, {}, "sdpa"),
        (8, {}, "flash_attn"),
        (8, dict(dtype=torch.float16), "flash_attn"),
        (8, dict(deterministic=True), "flash_attn"),
        (8, dict(dtype=torch.float32), "sdpa"),
        (8, dict(key_mask=True), "sdpa"),
        (9, {}, "xformers"),
        (9, dict(deterministic=True), "sdpa"),
        (10, {}, "sdpa"),
        (12, {}, "sdpa"),
    ],
)
def test_on_a_gpu(monkeypatch, packages, capability, kwargs, chosen):
    explanation = on_gpu(monkeypatch, capability, **kwargs)
    assert explanation.chosen == chosen
    used = {name for name, package in packages.items() if package.calls}
    assert used == {chosen} - {"sdpa"}
    for name in packages.keys() - {chosen}:
        assert explanation.reasons[name]
    if chosen == "flash_attn":
        expected = kwargs.get("deterministic", False)
        assert packages["flash_attn"].calls[0]["deterministic"] is expected


def test_the_choice_on_a_gpu_is_traced_without_a_break(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 0))
    step = torch.compile(lambda *qkv: attention(*qkv), backend="eager", fullgraph=True)
    with FakeTensorMode():
        qkv = [torch.empty(2, 5, 2, 8, device="cuda") for _ in range(3)]
        assert step(*qkv).shape == (2, 5, 2, 8)


def test_a_package_may_be_forced_where_it_is_not_preferred(monkeypatch, packages):
    monkeypatch.setenv("FASTVLP_ATTENTION", "flash_attn")
    assert on_gpu(monkeypatch, 9).chosen == "flash_attn"


def test_a_package_that_does_not_load_is_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # import raises
    module._import.cache_clear()
    explanation = on_gpu(monkeypatch, 8)
    module._import.cache_clear()
    assert explanation.chosen == "sdpa"
    assert "flash_attn does not import" in explanation.reasons["flash_attn"][0]
    assert "pip install" in explanation.reasons["flash_attn"][0]


GOOD = torch.ones(2, 3, 1, 4)


@pytest.mark.parametrize(
    "args, kwargs, error, message",
    [
        ((GOOD[0], GOOD, GOOD), {}, ValueError, r"q: .*\[batch, .*\(3, 1, 4\)"),
        ((GOOD, GOOD.double(), GOOD), {}, TypeError, "k: .*float32.*float64"),
        ((GOOD.long(),) * 3, {}, TypeError, "q: .*floating.*int64"),
        ((GOOD, GOOD, GOOD.to("meta")), {}, ValueError, "v: .*device.*cpu.*meta"),
        ((GOOD, GOOD[:1], GOOD), {}, ValueError, r"k: .*\(2, 3, 1, 4\).*\(1, 3, 1, 4\)"),
        ((GOOD, GOOD, GOOD[:, :2]), {}, ValueError, r"v: .*\(2, 3, 1, 4\).*\(2, 2, 1, 4\)"),
        ((GOOD[:, :2], GOOD, GOOD), dict(causal=True), ValueError, "causal: .*2 and 3"),
        ((GOOD,) * 3, dict(key_mask=torch.ones(2, 3)), TypeError, "key_mask: .*bool.*float32"),
        (
            (GOOD,) * 3,
            dict(key_mask=torch.ones(3, dtype=torch.bool)),
            ValueError,
            r"key_mask: .*\(2, 3\).*\(3,\)",
        ),
    ],
)
def test_bad_arguments(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        attention(*args, **kwargs)
