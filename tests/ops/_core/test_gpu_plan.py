"""The GPU's own plans: chunks as tall as memory allows, whatever suits a CPU."""

import contextlib
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from fastvlp.kernels._core.launch import Tile
from fastvlp.kernels._core.support import align
from fastvlp.kernels.contrastive import backward as contrastive_backward
from fastvlp.kernels.contrastive import sigmoid as contrastive_sigmoid
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastvlp.ops._core import gpu_plan
from fastvlp.ops.contrastive import cuda, register
from fastvlp.ops.contrastive.blocks import SavedLogits
from fastvlp.ops.contrastive.plan import make_gpu_plan, plan_for
from fastvlp.ops.soft_cross_entropy.register import make_gpu_plan as make_row_plan

DEVICE = torch.device("cuda", 0)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GIB = 1 << 30
SIZES = {8192: "8k", 32768: "32k", 65536: "65k"}


@contextlib.contextmanager
def memory_of(free):
    """As if a GPU with so many free bytes were there; yields the questions asked for them."""
    asked = []

    def mem_get_info(device):
        asked.append(device)
        return free, 2 * free

    gpu_plan._default_workspace_bytes.cache_clear()
    cuda = SimpleNamespace(is_available=lambda: True, mem_get_info=mem_get_info)
    with mock.patch.object(gpu_plan, "torch", SimpleNamespace(cuda=cuda)):
        yield asked
    gpu_plan._default_workspace_bytes.cache_clear()


@pytest.fixture
def h200():
    with memory_of(139 * GIB) as asked:
        yield asked


def test_free_memory_is_asked_for_once(h200):
    for _ in range(3):
        assert gpu_plan.default_workspace_bytes(DEVICE) == 4 * GIB
    assert h200 == [DEVICE]


@pytest.mark.parametrize("free", [90 * GIB, 120 * GIB, 159 * GIB])
def test_other_programs_do_not_change_the_chunks(free):
    # The sums over chunks, and so the last bits of gradients, depend on their size.
    with memory_of(free):
        assert gpu_plan.default_workspace_bytes(DEVICE) == 4 * GIB


# Rows of a chunk: 4 GiB over 2 bytes a logit and 4 bytes of a row's 512 fp32 gradients.
@pytest.mark.parametrize("n, chunks", [(8192, 1), (32768, 1), (65536, 3)], ids=SIZES.values())
def test_chunks_of_the_default(h200, n, chunks):
    plan = make_gpu_plan(n, n, 512, torch.bfloat16, None, DEVICE)
    assert -(-n // plan.block_rows) == chunks
    assert (plan.block_cols, plan.keep_blocks, plan.chunk_rows, plan.chunk_cols) == (n, 0, 1, 1)


@pytest.mark.parametrize("n", SIZES, ids=SIZES.values())
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_chunk_has_4096_rows_however_little_is_free(n, dtype):
    with memory_of(GIB):
        assert make_gpu_plan(n, n, 512, dtype, None, DEVICE).block_rows >= 4096
    plan = make_gpu_plan(n, n, 512, dtype, None, torch.device("cuda", 7))  # none to ask
    assert plan.block_rows >= 4096


def test_the_callers_workspace_is_obeyed(h200):
    def rows(workspace):
        return make_gpu_plan(65536, 65536, 512, torch.bfloat16, workspace, DEVICE).block_rows

    assert rows(16 * GIB) == 65536
    assert rows(GIB) == 6656  # 10 chunks of at most (1 GiB - 128 MiB) / 130 KiB
    assert rows(1) == 128
    assert h200 == []


@given(
    rows=st.integers(1, 200_000),
    cols=st.integers(1, 200_000),
    dim=st.sampled_from([1, 512, 1280]),
    dtype=st.sampled_from(DTYPES),
    workspace=st.integers(1, 1 << 36),
)
def test_chunks_are_whole_tiles_within_the_budget(rows, cols, dim, dtype, workspace):
    plan = make_gpu_plan(rows, cols, dim, dtype, workspace, DEVICE)
    height = plan.block_rows
    assert height == rows or (height % 128 == 0 and height < rows)
    used = height * (align(cols) * dtype.itemsize + 4 * dim)
    if dtype != torch.float32:
        used += 4 * dim * cols
    assert used <= workspace or height <= 128


def test_no_chunk_is_much_smaller_than_the_others(h200):
    assert gpu_plan.even_chunks(1000, 1000) == 1000
    assert gpu_plan.even_chunks(40_000, 32_768) == 20_096  # not 32,768 and 7,232
    assert gpu_plan.even_chunks(1000, 300) == 256
    assert gpu_plan.even_chunks(1000, 100) == 100


def test_every_part_of_a_group_has_the_whole_workspace(h200):
    with FakeTensorMode():
        x = torch.empty(4096, 512, dtype=torch.bfloat16, device="cuda")
        logits = SavedLogits(x, [{4096}, {65536}], None, True)
        alone = plan_for(x, 65536, None, True)
        assert logits.slot(1, 65536)[0] == alone
        assert alone.block_rows == 4096 and logits.slot(1, 65536)[1].numel() == 0


# --- launches of the host code --------------------------------------------------------------------


class Launches(TorchDispatchMode):
    """Counts matmuls and launches of kernels; the kernels themselves do not run."""

    def __init__(self):
        super().__init__()
        self.products, self.kernels = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.products += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return function(*args, **(kwargs or {}))

    def launch(self, *_):
        self.kernels += 1


@contextlib.contextmanager
def counted(module):
    launches = Launches()
    with (
        mock.patch.object(module, "launch", launches.launch),
        mock.patch.object(module, "aligned_rows", lambda t: t),
        mock.patch.object(module, "tile_for", lambda tiles, x: tiles[90, x.element_size()]),
        mock.patch.object(module, "on_device", lambda _: contextlib.nullcontext()),
        mock.patch.object(module, "require_supported", lambda *_, **__: None),
        FakeTensorMode(),
        launches,
    ):
        yield launches


def arguments(n):
    x, y = (torch.empty(n, 512, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return x, y, torch.empty((), device="cuda")


# Before, at 65,536 rows: 512 chunks, whatever the workspace.
@pytest.mark.parametrize("n, chunks", [(8192, 1), (32768, 1), (65536, 3)], ids=SIZES.values())
def test_launches_of_the_gradients(h200, n, chunks):
    with counted(contrastive_backward) as launches:
        x, y, scale = arguments(n)
        lse, weights = torch.empty(n, dtype=torch.float64, device="cuda"), scale.new_empty(2)
        plan = plan_for(x, n, None, True)
        register._gradients_triton(
            x, y, scale, lse, lse, lse.float(), weights, x[:0], 0, plan.block_rows,
            plan.block_cols, plan.keep_blocks, plan.chunk_rows, plan.chunk_cols,
        )  # fmt: skip
    assert (launches.kernels, launches.products) == (chunks, 2 * chunks)


@pytest.mark.parametrize("n, chunks", [(8192, 1), (32768, 1), (65536, 3)], ids=SIZES.values())
def test_launches_of_the_sigmoid_loss(h200, n, chunks):
    with counted(contrastive_sigmoid) as launches:
        x, y, scale = arguments(n)
        plan = plan_for(x, n, None, False)
        register._sigmoid_triton(
            x, y, scale, scale, 1.0 / n, 0, True, plan.block_rows, plan.block_cols,
            plan.chunk_rows, plan.chunk_cols,
        )  # fmt: skip
    assert (launches.kernels, launches.products) == (chunks, 2 * chunks)


@pytest.mark.parametrize("cols", [65536, 65537, 1000])
def test_the_kernels_take_the_chunks_of_the_plan(h200, cols):
    from fastvlp.kernels._core.launch import rows_per_chunk

    with FakeTensorMode():
        x, y = (torch.empty(n, 512, dtype=torch.bfloat16, device="cuda") for n in (65536, cols))
        plan = plan_for(x, cols, GIB, False)
        workspace = register._workspace(x, y, plan.block_rows)
    found = rows_per_chunk(65536, cols, 2, workspace, Tile(128, 64, 64, 8, 4, 3))
    assert found == plan.block_rows


def test_the_compiled_passes_make_room_for_their_products():
    # fp32 products and half-precision gradients: three times the bytes of a gradient.
    x = torch.empty(0, dtype=torch.bfloat16)
    assert cuda._chunk(x, 21888, 65536) == (7296, 65536)
    assert cuda._chunk(x.float(), 21888, 65536) == (21888, 65536)


# --- soft cross entropy ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cols, heads, chunk", [(30522, 1, 1024), (30522, 2, 512), (250_000, 2, 128), (400_000, 2, 128)]
)
def test_chunks_of_a_vocabulary_are_128_mib_or_128_rows(h200, cols, heads, chunk):
    plan = make_row_plan(2000, cols, torch.bfloat16, heads, None, DEVICE)
    assert (plan.chunk_rows, plan.group_rows) == (chunk, 2000)


@given(
    rows=st.integers(0, 50_000),
    cols=st.integers(1, 100_000),
    dtype=st.sampled_from(DTYPES),
    heads=st.sampled_from([1, 2]),
    workspace=st.integers(1, 1 << 34),
)
def test_groups_of_rows_stay_within_the_budget(rows, cols, dtype, heads, workspace):
    plan = make_row_plan(rows, cols, dtype, heads, workspace, DEVICE)
    assert 1 <= plan.chunk_rows <= plan.group_rows <= max(rows, 1)
    used = 4 * plan.group_floats + 4 * plan.chunk_rows * cols * heads
    assert used <= workspace or plan.group_rows == 1


def test_small_vocabularies_take_few_chunks(h200):
    plan = make_row_plan(1000, 3129, torch.bfloat16, 1, None, DEVICE)
    assert plan.chunk_rows == 1000
