"""The kernels of csrc/cuda through their host code, compiled for two GPUs and executed as PTX.

The checks are those of the kernels that the host compiler builds (tests/ops/contrastive/test_cuda)
and of the CPU operators (tests/ops/ema/test_ema), at sizes around the tiles: 128 x 256 for
statistics, 32 x 256 for gradients, chunks of 8,192 elements for lists of tensors.
"""

from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fastvlp_tests import cuda_passes, test_files
from ptx_machine import cuda_device
from ptx_machine.errors import HazardError
from ptx_machine.schedule import SCHEDULES

contrastive = test_files.load("ops/contrastive/test_cuda.py")
test_ema = test_files.load("ops/ema/test_ema.py")

TARGETS = (80, 90)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNELS = {
    "tile_statisticsILb1ELb1EE", "tile_statisticsILb1ELb0EE", "tile_statisticsILb0ELb1EE",
    "finish_rows", "finish_cols", "write_softmax_gradientIfE", "write_softmax_gradientI13__nv_",
    "write_softmax_gradientI6__half", "sigmoid_tileIfE", "sigmoid_tileI13__nv_",
    "sigmoid_tileI6__half", "add_partials", "update_emaILi4EE", "update_emaILi1EE",
    "step_adamwILi4EE", "step_adamwILi1EE", "clear_last", "find_exceedingILi4EE",
    "find_exceedingILi1EE",
}  # fmt: skip


@pytest.fixture(scope="module")
def executed():
    """What this module has executed: kernels as (target, kernel), and the names of its tests."""
    return SimpleNamespace(kernels=set(), tests=set())


@pytest.fixture(params=TARGETS, ids=lambda target: f"sm_{target}")
def gpu(request, library, executed, kernel_counts):
    """A device whose launches are counted at the end of the test."""
    device = cuda_device.CudaDevice(request.param)
    yield device
    executed.tests.add(request.node.name)
    for launched, *_ in device.launches:
        (name,) = (kernel for kernel in KERNELS if kernel in launched)
        executed.kernels.add((request.param, name))
        kernel_counts.executed(request.param, name)


@pytest.fixture
def passes(gpu):
    names = ("statistics", "gradient", "sigmoid")
    return SimpleNamespace(**{n: partial(gpu.call, f"contrastive_cuda_{n}") for n in names})


def check(test):
    """A property test's function, for one example."""
    return test.hypothesis.inner_test


# Rows, columns, gap between rows, offset of the positives: aligned tiles, ragged ones read as
# vectors, ragged ones read one by one, one ragged tile.
SIZES = [(256, 512, 0, 0), (161, 260, 4, 200), (129, 257, 1, -3), (5, 3, 0, 1)]
MATRICES = pytest.mark.parametrize("rows, cols, gap, offset", SIZES)


@MATRICES
@pytest.mark.parametrize("wanted", ["both", "rows", "cols"])
def test_statistics(passes, rows, cols, gap, offset, wanted):
    check(contrastive.test_statistics_kernel)(
        passes, rows, cols, gap, offset, deviation=1.0, wanted=wanted, carried=rows > 200
    )


@MATRICES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient(passes, rows, cols, gap, offset, dtype):
    terms = {256: "both", 161: "rows", 129: "cols", 5: "both"}[rows]
    check(contrastive.test_gradient_kernel)(
        passes, rows, cols, gap, offset, deviation=1.0, dtype=dtype, out_gap=gap, terms=terms
    )


@MATRICES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sigmoid(passes, rows, cols, gap, offset, dtype):
    check(contrastive.test_sigmoid_kernel)(
        passes, rows, cols, gap, offset, deviation=1.0, dtype=dtype, out_gap=gap, wanted=rows != 5
    )


def test_infinities_nan_and_large_logits(passes):
    contrastive.test_statistics_kernel_keeps_infinities_and_nan(passes)
    contrastive.test_a_positive_past_the_last_column_is_none(passes)
    check(contrastive.test_statistics_kernel)(
        passes, 33, 130, 0, 0, deviation=30.0, wanted="both", carried=True
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_losses(passes, dtype):
    """The composition of the passes with matmuls, in several chunks of rows and columns."""
    sizes = dict(m=64, n=90, dim=33, dtype=dtype, scale=14.3, offset=2, chunk=(1, 2))
    with cuda_passes.installed(passes):
        check(contrastive.test_softmax_composition)(
            None, **sizes, strided=False, directions=(True, True), upstream=1.0
        )
        check(contrastive.test_sigmoid_composition)(
            None, **sizes, strided=True, bias=-10.0, gradients=True
        )


# --- lists of tensors -----------------------------------------------------------------------------


@pytest.fixture
def multi_tensor(gpu):
    """The multi-tensor operators of fastvlp, on CPU tensors, by the CUDA library."""
    with _installed(gpu):
        yield


@contextmanager
def _installed(gpu):
    with torch.library._scoped_library("fastvlp", "IMPL") as ours:
        for name in ("ema_update", "adamw_ema", "last_exceeding"):
            ours.impl(name, partial(gpu.call, name), "CPU", allow_override=True)
        yield


CPU = torch.device("cpu")
# Several chunks, less than a vector, nothing, an odd number; all four layouts of the cases.
SHAPES = [(300, 130), (1,), (3, 0), (5, 31), (2, 3, 4, 5)]
LAYOUTS = [("contiguous",) * 3, ("transposed", "gaps", "offset"), ("offset", "offset", "gaps")]
ISA = "portable"  # of the CPU operators, which do not run


@pytest.mark.parametrize("momentum", DTYPES, ids=str)
@pytest.mark.parametrize("source", DTYPES, ids=str)
def test_momentum_update(monkeypatch, multi_tensor, gpu, momentum, source):
    # Each layout with each dtype of either list.
    layouts = LAYOUTS[(DTYPES.index(momentum) + DTYPES.index(source)) % 3]
    copies = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float16}.get(source)
    decay = 0.3 if source == torch.float32 else 0.995
    check(test_ema.test_ema_matches_float64)(
        monkeypatch, CPU, SHAPES, (momentum, source, copies), layouts, decay, 1.0, ISA
    )
    assert gpu.launches


@pytest.mark.parametrize("weight", DTYPES, ids=str)
@pytest.mark.parametrize("extras", [(0, 0, 0), (1, 1, 1), (0, 1, 0)])
def test_adamw_step(monkeypatch, multi_tensor, gpu, weight, extras):
    layouts = LAYOUTS[(DTYPES.index(weight) + sum(extras)) % 3][:2]
    low = torch.float16 if weight == torch.bfloat16 else torch.bfloat16
    check(test_ema.test_adamw_matches_float64)(
        monkeypatch, CPU, SHAPES, (weight, low, low), layouts, extras, 7, 1.0, extras[0] == 0, ISA
    )
    assert gpu.launches


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_that_are_not_finite(multi_tensor, gpu, dtype):
    test_ema.test_check_finite_writes_nothing(CPU, float("nan"), dtype)
    test_ema.test_last_exceeding(CPU)
    strided = [torch.ones(9, 4, dtype=dtype)[:, ::2], torch.ones(8193, dtype=dtype)]
    ops = torch.ops.fastvlp
    assert ops.last_exceeding(strided, 2.0).item() == -1
    strided[0][8, 1] = 3.0
    assert ops.last_exceeding(strided, 2.0).item() == 0
    strided[1][8192] = float("inf")
    assert ops.last_exceeding(strided, 2.0).item() == 1
    assert gpu.launches


@pytest.mark.parametrize("layout", ["gaps", "transposed"])
def test_only_the_elements_change(multi_tensor, layout):
    test_ema.test_what_lies_between_elements_is_left_alone(CPU, layout)
    test_ema.test_an_average_that_equals_its_source_stays(CPU)
    test_ema.test_tied_tensors_move_once(CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decay_in_device_memory(multi_tensor, dtype):
    test_ema.test_decay_tensor(CPU, dtype)


def test_tables_of_addresses_are_kept_and_freed(gpu):
    """A table that the host code keeps is found by the next call, on whichever device."""
    tensors = [torch.zeros(8193)], [torch.ones(8193)], []
    for step, target in enumerate((gpu.target, *TARGETS)):
        cuda_device.CudaDevice(target).call("ema_update", *tensors, None, 0.5, None)
        np.testing.assert_array_equal(tensors[0][0], 1 - 0.5 ** (step + 1))


def without_barriers(text):
    return text.replace("bar.sync \t0;", "")


def without_stores(text):
    """Nothing is stored by tile_statistics, whose results the next kernel reads."""
    head, name, rest = text.partition("tile_statisticsILb1ELb0E")
    if not name:
        return text
    body, end, tail = rest.partition("\n}\n")
    return head + name + body.replace("st.global.f32", "@!%p1 st.global.f32 ") + end + tail


@pytest.mark.parametrize(
    "change, wanted, kind",
    [(without_barriers, "both", "shared race"), (without_stores, "rows", "unwritten")],
)
def test_planted_hazards_are_found(gpu, change, wanted, kind):
    names = ("statistics", "gradient", "sigmoid")
    broken = cuda_device.CudaDevice(gpu.target, change=change)
    passes = SimpleNamespace(**{n: partial(broken.call, f"contrastive_cuda_{n}") for n in names})
    with pytest.raises(HazardError, match=kind):
        check(contrastive.test_statistics_kernel)(
            passes, 5, 3, 0, 0, deviation=1.0, wanted=wanted, carried=False
        )


def test_every_schedule_gives_the_same_bits(gpu):
    """The kernels with barriers, and those that several blocks of work share out."""
    gpu.schedules = SCHEDULES[::4]  # all warps in step, and one after another in a random order
    similarities, scale = torch.randn(40, 30), torch.tensor(2.0)
    pairs = torch.stack((torch.full((30,), -torch.inf), torch.zeros(30)))
    rows = torch.empty(40, dtype=torch.float64), torch.empty(40)
    gpu.call("contrastive_cuda_statistics", similarities, scale, 0, *rows, pairs)
    sums = torch.zeros(2, dtype=torch.float64)
    gpu.call("contrastive_cuda_sigmoid", similarities, scale, scale, 0.5, 0, sums, torch.empty(0))
    lists = [torch.ones(100), torch.ones(5), torch.full((90,), 3.0)]
    assert gpu.call("last_exceeding", lists, 2.0).item() == 2
    assert sums.isfinite().all() and pairs.isfinite().all()


def test_every_kernel_was_executed_for_every_target(request, library, executed):
    every = request.node.getparent(pytest.Module).collect()
    left_out = {test.name for test in every if "gpu" in test.fixturenames} - executed.tests
    if left_out:
        pytest.skip(f"needs the whole module: {len(left_out)} of its tests did not run before")
    assert executed.kernels == {(target, kernel) for target in TARGETS for kernel in KERNELS}
