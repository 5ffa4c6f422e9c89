"""The CUDA kernels of the momentum update without a GPU: compiled for the CPU, on lists of CPU
tensors, bit for bit what the CPU kernels of the baseline instruction set compute."""

import math
from pathlib import Path

import pytest
import torch
from fastvlp_tests import cuda_passes
from fastvlp_tests.ema_cases import DTYPES, LAYOUTS, SHAPES, tensor
from hypothesis import given, settings
from hypothesis import strategies as st

import fastvlp.ops  # noqa: F401  (loads the operators)

OURS = torch.ops.fastvlp


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ema_cu")
    target = "-DTORCH_TARGET_VERSION=0x020a000000000000"
    libraries = Path(torch.__file__).parent / "lib"
    cuda_passes.compile_cuda(
        "ema", "ema_entry.cpp", folder, target, "-ffp-contract=off",
        f"-L{libraries}", "-Wl,--no-as-needed", "-ltorch_cpu", "-lc10",
    )  # fmt: skip
    return torch.ops.fastvlp_emulated


def pair(function):
    """Two independent sets of the same sampled lists."""
    return function(), function()


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x.nan_to_num(123.0), y.nan_to_num(123.0))


@given(
    shapes=SHAPES,
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 2, st.sampled_from([None, *DTYPES])),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    decay=st.sampled_from([0.0, 0.3, 0.995, 1.0]),
    as_tensor=st.sampled_from([None, torch.float32, torch.float64]),
)
@settings(max_examples=60)
def test_ema(monkeypatch, kernels, shapes, dtypes, layouts, decay, as_tensor):
    monkeypatch.setenv("FASTVLP_CPU_ISA", "portable")

    def lists():
        return [
            []
            if dtype is None
            else [tensor(s, dtype, lay, 1.0, 10 * i + j) for j, s in enumerate(shapes)]
            for i, (dtype, lay) in enumerate(zip(dtypes, layouts, strict=True))
        ]

    ours, theirs = pair(lists)
    how = (None, decay) if as_tensor is None else (torch.tensor(decay, dtype=as_tensor), 0.0)
    kernels.ema_update(*ours, *how, None)
    OURS.ema_update(*theirs, *how, None)
    assert_same(ours, theirs)


@given(
    shapes=SHAPES,
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 3),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 2),
    extras=st.sampled_from([(0, 0, 0), (1, 0, 0), (1, 1, 1), (0, 1, 0)]),
    maximize=st.booleans(),
)
@settings(max_examples=40)
def test_adamw(monkeypatch, kernels, shapes, dtypes, layouts, extras, maximize):
    monkeypatch.setenv("FASTVLP_CPU_ISA", "portable")
    kinds = [dtypes[0], dtypes[1], *[torch.float32] * 3, dtypes[2], dtypes[2]]

    def lists():
        return [
            [tensor(s, kind, layouts[i % 2], 1.0, 10 * i + j).abs_() for j, s in enumerate(shapes)]
            if i < 4 or extras[i - 4]
            else []
            for i, kind in enumerate(kinds)
        ]

    ours, theirs = pair(lists)
    rest = (1e-2, 0.9, 0.99, 1e-8, 0.1, 3.0, maximize, None, 0.9, torch.tensor(-1))
    kernels.adamw_ema(*ours, *rest)
    OURS.adamw_ema(*theirs, *rest)
    assert_same(ours, theirs)


@pytest.mark.parametrize("decay, flag", [(math.nan, -1), (1.5, -1), (-0.1, -1), (0.5, 0), (0.5, 3)])
def test_nothing_is_written_when_told_so_on_the_device(kernels, decay, flag):
    m, s = torch.zeros(5000), torch.ones(5000)
    kernels.ema_update([m], [s], [], torch.tensor(decay), 0.0, torch.tensor(flag))
    assert (m == 0).all()
    kernels.adamw_ema(
        [m], [s], [m.clone()], [m.clone()], [m.clone()], [], [], 0.1, 0.9, 0.9, 1e-8, 0.0, 1.0,
        False, torch.tensor(decay), 0.0, torch.tensor(flag),
    )  # fmt: skip
    assert (m == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_last_exceeding(kernels, dtype):
    tensors = [torch.ones(n, dtype=dtype) for n in (3000, 7, 0, 5000, 2)]
    assert kernels.last_exceeding(tensors, 10.0).item() == -1
    tensors[0][2999] = math.inf
    assert kernels.last_exceeding(tensors, 10.0).item() == 0
    tensors[3][1234] = math.nan
    assert kernels.last_exceeding(tensors, 10.0).item() == 3
    tensors[3][1234] = 10.0
    assert kernels.last_exceeding(tensors, 10.0).item() == 0
