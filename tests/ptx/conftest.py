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
def run_on_ptx(virtual_gpus, kernel_counts):
    """run_on_ptx(capability, **options)(module, function, *args, **kwargs).

    Calls fastvlp.kernels.<module>.<function> with its launches on the PTX machine; the options are
    those of `ptx_machine.virtual_gpu.VirtualGPU`. Fails where the machine finds a hazard.
    """
    return _caller(virtual_gpus, virtual_process.run, kernel_counts)


@pytest.fixture
def count_on_ptx(virtual_gpus, kernel_counts):
    """The same, giving the results and the counts of the launches (see `virtual_process.count`)."""
    return _caller(virtual_gpus, virtual_process.count, kernel_counts)


def _caller(pools, function, kernel_counts):
    def on(capability: int, **options):
        def call(module, *args, **kwargs):
            task = pools(capability).submit(function, capability, options, module, *args, **kwargs)
            result = task.result()
            # The kernels of the package, not those that are planted for the machine's own tests.
            if not module.startswith("ptx_machine.") and options.get("execute", True):
                kernel_counts.executed(capability)
            return result

        return call

    return on


@pytest.fixture(scope="session")
def library():
    """The host code of csrc/cuda for CPU tensors; a test that needs it says what is missing."""
    try:
        return cuda_library.load()
    except cuda_library.Missing as missing:
        pytest.skip(str(missing))
