"""What cross_attention refuses, which implementation runs, and how torch sees its operators."""

import functools
import sys

import pytest
import torch
from fastvlp_tests.attention_cases import DTYPES, NAMES, draw, run
from torch.utils._python_dispatch import TorchDispatchMode

from fastvlp.ops import cross_attention, cross_attention_reference, explain

Q, K = torch.zeros(5, 2, 8), torch.zeros(2, 3, 2, 8)
CU = torch.tensor([0, 4, 5], dtype=torch.int32)
PACKED = torch.zeros(6, 2, 8)
CU_K = torch.tensor([0, 2, 6], dtype=torch.int32)
GOOD = {"q": Q, "k": K, "v": K, "cu_seqlens_q": CU}
GOOD_PACKED = {"q": Q, "k": PACKED, "v": PACKED, "cu_seqlens_q": CU, "cu_seqlens_k": CU_K}


def starts(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


def refused(name, arguments):
    with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b.*expected.*got") as caught:
        cross_attention(**arguments)
    # The first word says which argument is wrong.
    assert str(caught.value).split(":")[0] == name


@pytest.mark.parametrize(
    "name, changes",
    [
        ("q", {"q": [1.0]}),
        ("q", {"q": Q.long()}),
        ("q", {"q": Q[0]}),
        ("q", {"q": Q[None]}),
        ("q", {"q": Q[:, :0]}),
        ("k", {"k": None}),
        ("k", {"k": K.half()}),
        ("k", {"k": K.to("meta")}),
        ("k", {"k": K[:, :, :1], "v": K[:, :, :1]}),
        ("k", {"k": K[..., :5], "v": K[..., :5]}),
        ("k", {"k": K[0], "v": K[0]}),
        ("v", {"v": K[:, :2]}),
        ("v", {"v": K[:1]}),
        ("v", {"v": K[..., :5]}),
        ("v", {"v": K.bfloat16()}),
        ("v", {"v": K.to("meta")}),
        ("cu_seqlens_q", {"cu_seqlens_q": [0, 4, 5]}),
        ("cu_seqlens_q", {"cu_seqlens_q": CU.float()}),
        ("cu_seqlens_q", {"cu_seqlens_q": CU[None]}),
        ("cu_seqlens_q", {"cu_seqlens_q": CU[:0]}),
        ("cu_seqlens_q", {"cu_seqlens_q": CU.to("meta")}),
        ("cu_seqlens_q", {"cu_seqlens_q": starts(1, 4, 5)}),
        ("cu_seqlens_q", {"cu_seqlens_q": starts(0, 6, 5)}),
        ("cu_seqlens_q", {"cu_seqlens_q": starts(0, -1, 5)}),
        ("cu_seqlens_q", {"cu_seqlens_q": starts(0, 4, 6)}),
        ("cu_seqlens_q", {"cu_seqlens_q": starts(0, 3, 4)}),
        ("cu_seqlens_q", {"cu_seqlens_q": starts(0, 5)}),
        ("cu_seqlens_q", {"cu_seqlens_q": starts(0, 2, 4, 5)}),
        ("key_mask", {"key_mask": [True]}),
        ("key_mask", {"key_mask": torch.ones(2, 3)}),
        ("key_mask", {"key_mask": torch.ones(2, 3, dtype=torch.int64)}),
        ("key_mask", {"key_mask": torch.ones(2, 4, dtype=torch.bool)}),
        ("key_mask", {"key_mask": torch.ones(6, dtype=torch.bool)}),
        ("key_mask", {"key_mask": torch.ones(2, 3, dtype=torch.bool, device="meta")}),
        ("scale", {"scale": float("nan")}),
        ("scale", {"scale": float("inf")}),
        ("scale", {"scale": 1e7}),
        ("scale", {"scale": "1"}),
        ("scale", {"scale": torch.tensor(0.5)}),
        ("dropout_p", {"dropout_p": -0.1}),
        ("dropout_p", {"dropout_p": 1.0}),
        ("dropout_p", {"dropout_p": float("nan")}),
        ("dropout_p", {"dropout_p": "0.1"}),
        ("dropout_p", {"dropout_p": torch.tensor(0.5)}),
        ("max_seqlen_q", {"max_seqlen_q": -5}),
        ("max_seqlen_q", {"max_seqlen_q": 4.0}),
        ("max_seqlen_k", {"max_seqlen_k": "x"}),
        ("max_seqlen_k", {"max_seqlen_k": -1}),
        ("dropout_seed", {"dropout_p": 0.1, "dropout_seed": 1.5}),
        ("dropout_seed", {"dropout_p": 0.1, "dropout_seed": 1 << 64}),
        ("dropout_seed", {"dropout_p": 0.1, "dropout_seed": torch.ones(())}),
        ("dropout_seed", {"dropout_p": 0.1, "dropout_seed": torch.ones(2, dtype=torch.int64)}),
    ],
)
@pytest.mark.parametrize("return_probs", [False, True])
def test_bad_arguments(name, changes, return_probs):
    refused(name, GOOD | changes | {"return_probs": return_probs})


@pytest.mark.parametrize(
    "name, changes",
    [
        ("k", {"k": K, "v": K}),
        ("v", {"v": PACKED[:5]}),
        ("cu_seqlens_k", {"cu_seqlens_k": starts(1, 2, 6)}),
        ("cu_seqlens_k", {"cu_seqlens_k": starts(0, 7, 6)}),
        ("cu_seqlens_k", {"cu_seqlens_k": starts(0, 2, 5)}),
        ("cu_seqlens_k", {"cu_seqlens_k": CU_K.double()}),
        ("cu_seqlens_q", {"cu_seqlens_k": starts(0, 6)}),
        ("key_mask", {"key_mask": torch.ones(2, 3, dtype=torch.bool)}),
    ],
)
def test_bad_packed_arguments(name, changes):
    refused(name, GOOD_PACKED | changes)


def test_the_good_arguments_are_good():
    assert cross_attention(**GOOD).shape == cross_attention(**GOOD_PACKED).shape == Q.shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_explain(device, monkeypatch, dtype):
    arguments = draw([4], 6, dtype=dtype, device=device).arguments()[0]
    kernel, other = ("native", "triton") if device.type == "cpu" else ("triton", "native")
    found = explain("cross_attention", *arguments)
    assert found.chosen == kernel and found.reasons[other]
    assert "preferred" in found.reasons["reference"][0]
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in arguments]
    assert explain("cross_attention", *wide).chosen == "reference"
    monkeypatch.setenv("FASTVLP_BACKEND", "reference")
    assert explain("cross_attention", *arguments).chosen == "reference"


def test_forced_backend(monkeypatch):
    case = draw([20, 3], 30, mask="holes")
    native = run(cross_attention, case)
    monkeypatch.setenv("FASTVLP_BACKEND", "reference")
    forced = run(cross_attention, case)
    expected = run(cross_attention_reference, case)
    for name in NAMES:
        assert torch.equal(getattr(forced, name), getattr(expected, name))
    assert not torch.equal(native.q, forced.q)
    monkeypatch.setenv("FASTVLP_BACKEND", "native")
    assert torch.equal(run(cross_attention, case).q, native.q)
    wide = [t.double() if t.is_floating_point() else t for t in (case.q, case.k, case.v)]
    with pytest.raises(RuntimeError, match="(?s)no implementation can run.*not native.*float64"):
        cross_attention(*wide, case.cu_q)
    monkeypatch.setenv("FASTVLP_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="(?s)no implementation can run.*not triton.*CUDA"):
        run(cross_attention, case)


@pytest.mark.parametrize("mask, dropout_p", [(None, 0.0), ("holes", 0.0), (None, 0.3)])
def test_the_operator_alone_checks_usual_arguments(monkeypatch, mask, dropout_p):
    case = draw([20, 3], 30, mask=mask)
    options = {"dropout_p": dropout_p, "dropout_seed": 7} if dropout_p else {}
    module = sys.modules["fastvlp.ops.cross_attention.api"]
    monkeypatch.setattr(module, "operator_takes", lambda *_: False)
    checked = run(cross_attention, case, **options)
    monkeypatch.undo()
    monkeypatch.setattr(module, "check_inputs", None)  # not called
    for name in NAMES:
        assert torch.equal(
            getattr(run(cross_attention, case, **options), name), getattr(checked, name)
        )
    with pytest.raises(TypeError, match="not callable"):
        cross_attention(Q[..., ::2], K[..., ::2], K[..., ::2], CU)


@pytest.mark.parametrize("wanted", ["q", "k", "v", "qk", "qv", "kv"])
def test_gradients_only_where_wanted(device, wanted):
    case = draw([20, 3], 30, device=device, mask="holes")
    every = run(cross_attention, case)
    tensors = {name: getattr(case, name).detach().clone() for name in "qkv"}
    for name in wanted:
        tensors[name].requires_grad_()
    out = cross_attention(*tensors.values(), case.cu_q, key_mask=case.key_mask)
    out.backward(case.upstream)
    for name, tensor in tensors.items():
        if name in wanted:
            assert torch.equal(tensor.grad, getattr(every, name))
        else:
            assert tensor.grad is None


def test_no_graph_where_none_is_wanted(device):
    case = draw([20, 3], 30, device=device)
    assert not cross_attention(*case.arguments()[0]).requires_grad
    case.q.requires_grad_()
    with torch.no_grad():
        assert not cross_attention(*case.arguments()[0]).requires_grad


def test_second_derivative_is_refused(device):
    case = draw([4], 6, dim=8, device=device)
    q = case.q.requires_grad_()
    out = cross_attention(q, case.k, case.v, case.cu_q)
    (gradient,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative.*cross_attention_reference"):
        gradient.sum().backward()


def test_backward_twice_with_a_retained_graph(device):
    case = draw([30, 4], 77, device=device)
    q = case.q.requires_grad_()
    out = cross_attention(q, case.k, case.v, case.cu_q, dropout_p=0.1, dropout_seed=1)
    (first,) = torch.autograd.grad(out, q, case.upstream, retain_graph=True)
    (second,) = torch.autograd.grad(out, q, case.upstream)
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_upstream_gradient_of_any_layout(device, dtype):
    case = draw([30, 4], 77, dtype=dtype, device=device)
    q = case.q.requires_grad_()
    out = cross_attention(q, case.k, case.v, case.cu_q)
    (expanded,) = torch.autograd.grad(out.sum(), q, retain_graph=True)
    (plain,) = torch.autograd.grad(out, q, torch.ones_like(out), retain_graph=True)
    assert torch.equal(expanded, plain)
    turned = case.upstream.transpose(0, 2).contiguous().transpose(0, 2)
    (strided,) = torch.autograd.grad(out, q, turned, retain_graph=True)
    (plain,) = torch.autograd.grad(out, q, case.upstream)
    assert torch.equal(strided, plain)


class Recorder(TorchDispatchMode):
    """Keeps the arguments of every call of one of our operators."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fastvlp":
            kept = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
            self.calls[function._schema.name] = function, kept
        return function(*args, **(kwargs or {}))


def recorded(case, **options):
    """(operator, arguments) of the forward and of the backward call."""
    with Recorder() as recorder:
        run(cross_attention, case, **options)
    assert sorted(recorder.calls) == [
        "fastvlp::cross_attention_backward",
        "fastvlp::cross_attention_forward",
    ]
    return recorder.calls.values()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keys", [50, [50, 7]])
@pytest.mark.parametrize("layout", ["heads first", "fused"])
def test_opcheck(device, dtype, keys, layout):
    case = draw([30, 4], keys, dtype=dtype, device=device, mask="holes", layout=layout)
    for function, arguments in recorded(case, dropout_p=0.1, dropout_seed=1):
        torch.library.opcheck(function, arguments)
    for function, arguments in recorded(draw([30, 4], keys, dtype=dtype, device=device)):
        torch.library.opcheck(function, arguments)


@pytest.mark.parametrize("keys", [50, [50, 7]])
def test_fake_tensors_on_a_device_that_is_not_here(device, keys):
    case = draw([30, 4], keys, dtype=torch.bfloat16, device=device, mask="holes")
    for function, arguments in recorded(case):
        real = function(*arguments)
        results = real if isinstance(real, tuple) else (real,)
        with torch._subclasses.fake_tensor.FakeTensorMode():
            fakes = [
                torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="cuda")
                if isinstance(a, torch.Tensor)
                else a
                for a in arguments
            ]
            found = function(*fakes)
        found = found if isinstance(found, tuple) else (found,)
        for fake, result in zip(found, results, strict=True):
            assert fake.device.type == "cuda" and fake.dtype == result.dtype
            if result.dtype == torch.bfloat16:  # statistics differ between devices
                assert fake.shape == result.shape


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_compiles_without_a_graph_break(device, dynamic, packed):
    torch.compiler.reset()
    options = {"max_seqlen_q": 64, "max_seqlen_k": 64, "dropout_p": 0.1, "dropout_seed": 3}

    def step(*tensors, **more):
        return cross_attention(*tensors, **more, **options) * 2

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for lengths in ([30, 4, 17], [12, 64]):
        keys = lengths if packed else 40 + len(lengths)
        case = draw(lengths, keys, device=device, mask="holes")
        ours, eager = run(compiled, case), run(step, case)
        for name in NAMES:
            assert torch.equal(getattr(ours, name), getattr(eager, name)), name


def test_compiles_with_a_seed_on_the_device(device):
    torch.compiler.reset()
    case = draw([30, 4], 40, device=device)
    call = functools.partial(cross_attention, dropout_p=0.2, max_seqlen_q=30)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for value in (1, 2):
        seed = torch.tensor(value, device=device)
        arguments = case.arguments()[0][:4]
        assert torch.equal(
            compiled(*arguments, dropout_seed=seed), call(*arguments, dropout_seed=seed)
        )
