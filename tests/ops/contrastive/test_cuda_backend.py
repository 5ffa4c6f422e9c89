"""The compiled CUDA passes as a backend: shapes under fake tensors, and when they run."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastvlp.ops import explain
from fastvlp.ops.contrastive import cuda, register

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def described(results):
    return [(tuple(t.shape), t.dtype, t.device.type) for t in results]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, cols", [(True, True), (True, False), (False, True)])
def test_fake_cuda_tensors(dtype, rows, cols):
    operators = torch.ops.fastvlp
    with FakeTensorMode():
        x, y = (torch.empty(size, 24, dtype=dtype, device="cuda") for size in (70, 100))
        scale, weights = torch.ones((), device="cuda"), torch.ones(2, device="cuda")
        nothing = torch.empty(0, device="cuda")
        arguments = x, y, scale, nothing, 3, rows, cols, 32, 32, 0
        ours = cuda.statistics(*arguments)
        assert described(ours) == described(operators.contrastive_statistics(*arguments))
        kinds = (70 * rows, torch.float64), (100 * cols, torch.float64), (70, torch.float32)
        assert described(ours) == [((size,), kind, "cuda") for size, kind in kinds]

        arguments = x, y, scale, *ours, weights, nothing, 3, 32, 32, 0, 2, 2
        ours = cuda.gradients(*arguments)
        assert described(ours) == described(operators.contrastive_gradients(*arguments))
        assert described(ours)[:2] == [((70, 24), dtype, "cuda"), ((100, 24), dtype, "cuda")]

        arguments = x, y, scale, scale, 0.1, 3, rows, 32, 32, 2, 2
        ours = cuda.sigmoid(*arguments)
        assert described(ours) == described(operators.contrastive_sigmoid(*arguments))
        assert ours[1].shape == (70 if rows else 0, 24)


@pytest.fixture
def gpu(monkeypatch):
    """A CUDA tensor, and a function that says what the GPU's two implementations lack."""

    def lacking(triton=(), native=()):
        monkeypatch.setattr("fastvlp.kernels.supported", lambda *_: list(triton))
        monkeypatch.setattr(cuda, "_unavailable", lambda _: tuple(native))

    monkeypatch.delenv("FASTVLP_BACKEND", raising=False)
    lacking()
    with FakeTensorMode():
        x = torch.empty(4, 8, dtype=torch.bfloat16, device="cuda")
    return x, lacking


@pytest.mark.parametrize("op", ["contrastive", "sigmoid_contrastive"])
def test_explain_on_a_gpu(gpu, monkeypatch, op):
    x, lacking = gpu
    assert explain(op, x, x).chosen == "triton"
    assert explain(op, x, x).reasons["native"] == ["triton is preferred"]
    lacking(triton=["Triton is not installed"])
    assert explain(op, x, x).chosen == "native"
    assert explain(op, x, x).reasons["triton"] == ["Triton is not installed"]
    lacking(triton=["Triton is not installed"], native=["this torch is a CPU build"])
    assert explain(op, x, x).chosen == "reference"
    monkeypatch.setenv("FASTVLP_BACKEND", "native")
    assert explain(op, x, x).chosen is None
    assert explain(op, x, x).reasons["native"] == ["this torch is a CPU build"]
    lacking()
    assert explain(op, x, x).chosen == "native"
    assert explain(op, x.double(), x.double()).chosen is None


@pytest.mark.parametrize("op", ["contrastive", "sigmoid_contrastive"])
def test_float32_features_on_a_gpu_take_the_products_of_cublas(gpu, monkeypatch, op):
    x, lacking = gpu[0].float(), gpu[1]
    assert explain(op, x, x).chosen == "native"
    assert explain(op, x, x).reasons["triton"] == ["native is preferred"]
    lacking(native=["nvcc was not found"])
    assert explain(op, x, x).chosen == "triton"
    assert explain(op, x, x).reasons["native"] == ["nvcc was not found"]
    lacking()
    monkeypatch.setenv("FASTVLP_BACKEND", "triton")
    assert explain(op, x, x).chosen == "triton"
    run = register._on_cuda(op, lambda *_: "triton", lambda *_: "native")
    assert run(x, x) == "triton"
    monkeypatch.delenv("FASTVLP_BACKEND")
    assert run(x, x) == "native"


def test_on_the_cpu_the_compiled_kernels_come_first():
    x = torch.zeros(4, 8)
    assert explain("contrastive", x, x).chosen == "native"
    assert "run on CUDA devices" in explain("contrastive", x, x).reasons["triton"][0]
    with FakeTensorMode():
        other = torch.empty(4, 8, device="meta")
    assert (
        "run on CPU and CUDA devices" in explain("contrastive", other, other).reasons["native"][0]
    )


@pytest.mark.parametrize("op", ["contrastive", "sigmoid_contrastive"])
def test_the_operator_runs_what_explain_names(gpu, monkeypatch, op):
    x, lacking = gpu
    run = register._on_cuda(op, lambda *_: "triton", lambda *_: "native")
    assert run(x, x) == explain(op, x, x).chosen
    lacking(triton=["Triton is not installed"])
    assert run(x, x) == "native"
    lacking()
    monkeypatch.setenv("FASTVLP_BACKEND", "native")
    assert run(x, x) == "native"


def test_a_device_that_cannot_run_the_kernels_is_named(monkeypatch):
    monkeypatch.setattr(cuda.compiled, "load_cuda", lambda: ("it was not built",))
    cuda._unavailable.cache_clear()
    assert cuda.unavailable(0) == ("it was not built",)
    cuda._unavailable.cache_clear()
