"""Which inputs and which GPUs the Triton kernels say they take."""

import pytest
import torch
from fastvlp.kernels import supported
from fastvlp.kernels._core import support
from fastvlp.kernels._core.aot import SHARED_LIMIT
from fastvlp.kernels._core.launch import CAPABILITIES, capability_key
from torch._subclasses.fake_tensor import FakeTensorMode


@pytest.fixture
def any_device(monkeypatch):
    """As if the device were no obstacle, so that only the tensors decide."""
    monkeypatch.setattr(support, "device_reasons", lambda device: [])
    monkeypatch.setattr(support, "matmul_reasons", lambda device: [])


def test_the_cpu_is_named_as_the_reason():
    x = torch.zeros(4, 8)
    assert supported(x, x) == ["Triton kernels run on CUDA devices, the inputs are on cpu"]


def test_triton_missing_is_named_as_the_reason(monkeypatch):
    monkeypatch.setattr(support.importlib.util, "find_spec", lambda name: None)
    x = torch.zeros(4, 8)
    assert supported(x, x) == ["Triton is not installed"]
    assert not support.interpreting()


@pytest.mark.parametrize(
    "capability, reasons", [((7, 5), 1), ((8, 0), 0), ((9, 0), 0), ((10, 3), 0), ((12, 0), 0)]
)
def test_old_gpus_are_refused(monkeypatch, capability, reasons):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = support.device_reasons(torch.device("cuda", 0))
    assert len(found) == reasons
    assert not reasons or "compute capability 8.0" in found[0]


@pytest.mark.parametrize(
    "version, capability, refused",
    [
        ("3.6.0", (10, 0), True), ("3.7.1", (10, 3), True), ("3.7.1", (11, 0), True),
        ("3.8.0", (10, 0), False), ("3.10.0", (10, 0), False), ("3.6.0", (9, 0), False),
        ("3.6.0", (12, 0), False),
    ],
)  # fmt: skip
def test_float32_matmuls_need_a_triton_that_keeps_them(monkeypatch, version, capability, refused):
    monkeypatch.setattr("triton.__version__", version)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with FakeTensorMode():
        x = torch.empty(4, 8, device="cuda")
        q, pairs = x.reshape(4, 2, 4), x.reshape(2, 2, 8)
    answers = (
        supported(x, x),
        support.attention_supported(q, q, q),
        support.alignment_supported(pairs, pairs),
    )
    assert all(("TF32" in " ".join(reasons)) == refused for reasons in answers)
    assert all(refused or not reasons for reasons in answers)
    assert supported(x.half(), x.half()) == []
    assert support.alignment_supported(pairs.half(), pairs.half()) == []


@pytest.mark.parametrize("dtype", support.DTYPES)
def test_usual_features_are_taken(any_device, dtype):
    x = torch.zeros(4, 24, dtype=dtype)
    assert supported(x, torch.zeros(9, 24, dtype=dtype)) == []
    assert supported(x[:, :20], x[::2, :20]) == []
    assert supported(x[:, ::24], x[:, ::24]) == []


@pytest.mark.parametrize(
    "x, y, reason",
    [
        (torch.zeros(4, 8).double(), torch.zeros(4, 8).double(), "dtype torch.float64 has no"),
        (torch.zeros(4, 8), torch.zeros(4, 8).half(), "both must have one dtype"),
        (torch.zeros(4, 8), torch.zeros(4, 8, device="meta"), "both must be on one device"),
        (torch.zeros(4, 8), torch.zeros(4, 7), "must be [M, D] and [N, D]"),
        (torch.zeros(4), torch.zeros(4), "must be [M, D] and [N, D]"),
        (torch.zeros(4, 0), torch.zeros(4, 0), "width D is 0"),
        (torch.zeros(8, 4).T, torch.zeros(4, 8), "last axis of x is not contiguous"),
    ],
)
def test_other_features_are_refused_with_one_reason(any_device, x, y, reason):
    found = supported(x, y)
    assert len(found) == 1 and reason in found[0]


@pytest.mark.parametrize(
    "capability, key",
    [
        ((8, 0), 80), ((8, 6), 120), ((8, 9), 120), ((9, 0), 90), ((10, 0), 100), ((10, 3), 100),
        ((11, 0), 100), ((12, 0), 120), ((12, 1), 120), ((13, 0), 120),
    ],
)  # fmt: skip
def test_every_gpu_finds_tiles_that_fit_it(capability, key):
    assert capability_key(*capability) == key
    assert key in CAPABILITIES and key in SHARED_LIMIT


@pytest.mark.parametrize("dtype", support.DTYPES)
def test_usual_attention_inputs_are_taken(any_device, dtype):
    q = torch.zeros(7, 2, 3, 64, dtype=dtype)[:, :, 0]
    keys = torch.zeros(2, 9, 2, 2, 64, dtype=dtype)
    assert support.attention_supported(q, keys[:, :, 0], keys[:, :, 1]) == []
    assert support.attention_supported(q, q, q) == []


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"k": torch.zeros(5, 2, 8).half()}, "one dtype is needed"),
        ({"v": torch.zeros(5, 2, 8, device="meta")}, "one device is needed"),
        ({"v": torch.zeros(5, 2, 7)}, "k and v [..., H, d]; the shapes are"),
        ({"k": torch.zeros(5, 3, 8), "v": torch.zeros(5, 3, 8)}, "q must be [total_q, H, d]"),
        ({"q": torch.zeros(4, 8, 2).mT}, "last axis of q is not contiguous"),
    ],
)
def test_other_attention_inputs_are_refused_with_one_reason(any_device, change, reason):
    usual = {"q": torch.zeros(4, 2, 8), "k": torch.zeros(5, 2, 8), "v": torch.zeros(5, 2, 8)}
    found = support.attention_supported(**usual | change)
    assert len(found) == 1 and reason in found[0]


def test_wide_heads_are_refused(any_device):
    q = torch.zeros(4, 2, support.LARGEST_HEAD + 1)
    assert support.attention_supported(q, q, q) == ["heads 129 wide have no kernel; up to 128 have"]
