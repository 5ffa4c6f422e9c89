"""Every kernel at every configuration, compiled for every architecture, without a GPU.

The table of registers and shared memory: `python -m fastvlp.kernels`.
"""

import pytest
from fastvlp.kernels._core import aot
from fastvlp_tests import triton_process

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


def test_the_summary_counts_cases_and_faults_by_kernel():
    def case(name, capability):
        return aot.Case(name, None, {}, {}, capability, warps=4, stages=1)

    def made(case, spilled):
        return aot.Compiled(case.name, case.capability, 1024, 40, 0, 0, local_stores=spilled)

    summary = aot.Summary()
    for name, capability, spilled in [
        ("merge last 64x64", 80, 0),
        ("rows-loss bf16 8x16", 80, 3),
        ("rows-loss fp32 8x16", 80, 0),
        ("rows-loss bf16 8x16", 90, 0),
    ]:
        each = case(name, capability)
        summary.add(each, made(each, spilled))
    summary.add(case("merge last 64x64", 90), None)
    assert summary.faults == 2
    assert list(summary.table()) == [
        "| kernel | sm_80 | sm_90 |",
        "|---|---|---|",
        "| merge last | 1 | 1, 1 not compiled |",
        "| rows-loss | 2, 1 spills | 1 |",
    ]
    assert next(summary.lines()).startswith("sm_80: 3 cases, 1 spills; at most 40 of 255 registers")
