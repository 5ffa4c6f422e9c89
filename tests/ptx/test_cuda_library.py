"""The host code of csrc/cuda on CPU tensors: what it launches, with which arguments."""

import ctypes
import re

import pytest
import torch


@pytest.fixture
def launches(library):
    """launches(operator, *arguments): the launches as (kernel, grid, block, shared bytes)."""

    def call(name, *arguments):
        seen = []
        library.call(name, arguments, lambda launch: seen.append(short(launch)))
        return seen

    return call


def short(launch):
    kernel = next(name for name in KERNELS if f"{len(name)}{name}" in launch.kernel)
    return kernel, launch.grid, launch.block, launch.shared_bytes


KERNELS = (
    "tile_statistics", "finish_rows", "finish_cols", "write_softmax_gradient", "sigmoid_tile",
    "add_partials", "update_ema", "step_adamw", "clear_last", "find_exceeding",
)  # fmt: skip
MULTI_TENSOR = ["update_emaILi4E", "step_adamwILi4E"]
BLOCK = (256, 1, 1)


def test_every_kernel_is_in_the_ptx_of_every_target(library):
    for target, modules in library.ptx.items():
        text = "".join(modules)
        assert f".target sm_{target}\n" in text
        for kernel in KERNELS:
            assert f"{len(kernel)}{kernel}" in text, (target, kernel)


@pytest.mark.parametrize("kernel", ["write_softmax_gradient", "sigmoid_tile"] + MULTI_TENSOR)
def test_neighbours_are_stored_in_one_access(library, kernel):
    """Of a plain assignment nvcc makes a store for each of the four."""
    for modules in library.ptx.values():
        entries = [text for module in modules for text in module.split(".entry ")[1:]]
        entries = [text for text in entries if kernel in text.split("(")[0]]
        assert entries
        for text in entries:
            assert re.search(r"\bst\.global\.wb\.v[24]\.", text), text.split("(")[0]


def test_statistics_of_tiles_then_of_rows_and_columns(launches):
    similarities, scale = torch.randn(130, 300), torch.tensor(2.0)
    rows, positive = torch.empty(130, dtype=torch.float64), torch.empty(130)
    pairs = torch.zeros(2, 300)
    name = "contrastive_cuda_statistics"
    assert launches(name, similarities, scale, 0, rows, positive, pairs) == [
        ("tile_statistics", (4, 1, 1), BLOCK, 0),
        ("finish_rows", (17, 1, 1), BLOCK, 0),
        ("finish_cols", (2, 1, 1), BLOCK, 0),
    ]
    none = torch.empty(2, 0)
    assert [k for k, *_ in launches(name, similarities, scale, 0, rows, positive, none)] == [
        "tile_statistics", "finish_rows",
    ]  # fmt: skip


def test_gradients_of_tiles(launches):
    similarities, scale = torch.randn(33, 257), torch.tensor(2.0)
    rows, cols = (torch.zeros(n, dtype=torch.float64) for n in similarities.shape)
    arguments = similarities, scale, rows, cols, torch.zeros(33), torch.ones(2), 0, similarities
    assert launches("contrastive_cuda_gradient", *arguments) == [
        ("write_softmax_gradient", (4, 1, 1), BLOCK, 0)
    ]
    sums, out = torch.zeros(2, dtype=torch.float64), torch.empty(33, 257, dtype=torch.bfloat16)
    arguments = similarities, scale, scale, 0.5, 0, sums, out
    assert launches("contrastive_cuda_sigmoid", *arguments) == [
        ("sigmoid_tile", (4, 1, 1), BLOCK, 0),
        ("add_partials", (1, 1, 1), BLOCK, 0),
    ]


def test_the_multi_tensor_operators_launch_a_kernel_for_flat_and_one_for_strided_tensors(launches):
    def tensors():
        return [torch.zeros(8193), torch.zeros(4), torch.zeros(6, 4)[:, ::2]]

    blocks = (4, 1, 1)  # of 8,192 elements: two, one and one
    twice = lambda name: [(name, blocks, BLOCK, 0)] * 2  # noqa: E731
    assert launches("ema_update", tensors(), tensors(), [], None, 0.5, None) == twice("update_ema")
    rest = [], [], [], 1e-3, 0.9, 0.99, 1e-8, 0.1, 1.0, False, None, 0.5, None
    assert launches("adamw_ema", *(tensors() for _ in range(4)), *rest) == twice("step_adamw")
    assert launches("last_exceeding", tensors(), 1.0) == [
        ("clear_last", (1, 1, 1), (1, 1, 1), 0), *twice("find_exceeding"),
    ]  # fmt: skip


def test_arguments_arrive_as_the_wrapper_passes_them(library):
    similarities, scale, bias = torch.randn(3, 8), torch.tensor(2.0), torch.tensor(-1.0)
    sums, found = torch.zeros(2, dtype=torch.float64), []

    def launch(given):
        if "sigmoid_tile" in given.kernel:
            at = given.arguments
            found.append(ctypes.c_void_p.from_address(at[0]).value)  # the first field of Products
            found.extend(ctypes.c_void_p.from_address(at[i]).value for i in (1, 2))
            found.append(ctypes.c_float.from_address(at[3]).value)

    arguments = similarities, scale, bias, 0.25, 0, sums, torch.empty(0)
    library.call("contrastive_cuda_sigmoid", arguments, launch)
    assert found == [similarities.data_ptr(), scale.data_ptr(), bias.data_ptr(), 0.25]


def test_host_code_tells_of_its_memory(library):
    made = []
    library.call(
        "ema_update", ([torch.zeros(5)], [torch.ones(5)], [], None, 0.5, None),
        lambda launch: None, lambda tensor, written: made.append((tensor.data_ptr(), written)),
    )  # fmt: skip
    (pinned, _), (table, _), copied = made
    assert pinned != table and copied == (table, True)
    assert [written for _, written in made] == [False, False, True]


def test_what_a_launch_raises_comes_out_of_the_operator(library):
    def launch(given):
        raise KeyError("the launch")

    arguments = [torch.zeros(5)], [torch.ones(5)], [], None, 0.5, None
    with pytest.raises(KeyError, match="the launch"):
        library.call("ema_update", arguments, launch)
    with pytest.raises(RuntimeError, match="decay: expected a value between 0 and 1"):
        library.call("ema_update", (*arguments[:4], 1.5, None), launch)
    assert library.call("cuda_kernels_unavailable", (0,), launch) == ""
