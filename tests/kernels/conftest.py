"""Kernels run interpreted in a child process, or on the GPU with `--device cuda`."""

import sys
from pathlib import Path

import pytest

# The helpers beside this file; child processes inherit the path and find them too.
sys.path.insert(0, str(Path(__file__).parent))

import triton_process  # noqa: E402


@pytest.fixture(scope="session")
def interpreter():
    with triton_process.start(interpret=True, workers=1) as pool:
        yield pool


@pytest.fixture
def run_kernel(request, device):
    """run_kernel(module, function, *args, **kwargs): where and how the device option says."""
    if device.type == "cuda":
        return triton_process.call
    pool = request.getfixturevalue("interpreter")

    def submit(*args, **kwargs):
        return pool.submit(triton_process.call, *args, **kwargs).result()

    return submit


@pytest.fixture
def run_kernel_with(request, device):
    """run_kernel_with({attribute: value}, module, function, ...): a module with other settings."""
    if device.type == "cuda":
        return triton_process.call_with
    pool = request.getfixturevalue("interpreter")

    def submit(*args, **kwargs):
        return pool.submit(triton_process.call_with, *args, **kwargs).result()

    return submit
