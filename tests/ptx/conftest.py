"""Kernels run on the PTX machine, in a child process for each compute capability."""

import pytest
from fastvlp_tests import triton_process
from ptx_machine import cuda_library, virtual_process


@pytest.fixture(scope="session")
def virtual_gpus():
    """Child processes by compute capability, started when first asked for."""
    pools = {}

    def pool(capability: int):
        if capability not in pools:
            pools[capability] = triton_process.start(interpret=False, workers=1)
        return pools[capability]

    yield pool
    for started in pools.values():
        started.shutdown()


@pytest.fixture
def run_on_ptx(virtual_gpus):
    """run_on_ptx(capability, **options)(module, function, *args, **kwargs).

    Calls fastvlp.kernels.<module>.<function> with its launches on the PTX machine; the options are
    those of `ptx_machine.virtual_gpu.VirtualGPU`. Fails where the machine finds a hazard.
    """
    return _caller(virtual_gpus, virtual_process.run)


@pytest.fixture
def count_on_ptx(virtual_gpus):
    """The same, giving the results and the counts of the launches (see `virtual_process.count`)."""
    return _caller(virtual_gpus, virtual_process.count)


def _caller(pools, function):
    def on(capability: int, **options):
        def call(*args, **kwargs):
            return pools(capability).submit(function, capability, options, *args, **kwargs).result()

        return call

    return on


@pytest.fixture(scope="session")
def library():
    """The host code of csrc/cuda for CPU tensors; a test that needs it says what is missing."""
    try:
        return cuda_library.load()
    except cuda_library.Missing as missing:
        pytest.skip(str(missing))
