"""Kernels run interpreted in a child process, or on the GPU with `--device cuda`; another child
compiles."""

import pytest
from fastvlp_tests import triton_process


@pytest.fixture(scope="session")
def interpreter():
    with triton_process.start(interpret=True, workers=1) as pool:
        yield pool


@pytest.fixture(scope="session")
def compiler():
    with triton_process.start(interpret=False, workers=1) as pool:
        yield pool


@pytest.fixture
def run_kernel(request, device, kernel_counts):
    """run_kernel(module, function, *args, **kwargs): where and how the device option says."""
    return _runner(triton_process.call, request, device, kernel_counts)


@pytest.fixture
def run_kernel_with(request, device, kernel_counts):
    """run_kernel_with({attribute: value}, module, function, ...): a module with other settings."""
    return _runner(triton_process.call_with, request, device, kernel_counts)


def _runner(call, request, device, kernel_counts):
    """`call` here on the GPU, or in the interpreter's process; the test counts as one case."""
    if device.type == "cuda":
        kernel_counts.launched()
        return call
    kernel_counts.interpreted()
    pool = request.getfixturevalue("interpreter")

    def submit(*args, **kwargs):
        return pool.submit(call, *args, **kwargs).result()

    return submit
