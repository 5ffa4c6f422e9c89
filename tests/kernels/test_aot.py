"""Every kernel at every configuration, compiled for every architecture, without a GPU.

The table of registers and shared memory: `python -m fastvlp.kernels.aot`.
"""

import pytest
import triton_process
from fastvlp.kernels import aot

CASES = aot.all_cases()


@pytest.fixture(scope="module")
def compiled():
    """The futures of all cases, compiled in the background."""
    with triton_process.start(interpret=False, workers=triton_process.compilers()) as pool:
        yield [pool.submit(triton_process.compile_by_index, i) for i in range(len(CASES))]
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize(
    "index", range(len(CASES)), ids=[f"sm_{c.capability}-{c.name}" for c in CASES]
)
def test_compiles_within_budget(compiled, index, record_property, kernel_counts):
    case, result = CASES[index], compiled[index].result()
    print(f"{aot.HEADER}\n{result.row()}")
    record_property("compiled", result.row())
    kernel_counts.compiled(case.capability)
    assert (result.name, result.capability) == (case.name, case.capability)
    assert 0 < result.registers <= 255
    assert aot.faults(case, result) == [], result.row()
