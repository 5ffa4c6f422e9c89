"""Every kernel at every configuration, compiled for every architecture, without a GPU.

The table of registers and shared memory: `python -m fastvlp.kernels`.
"""

import pytest
from fastvlp.kernels._core import aot
from fastvlp_tests import triton_process

CASES = aot.all_cases()


@pytest.fixture(scope="module")
def compiled(request):
    """The futures of the cases of this run by index, compiled in the background."""
    with triton_process.start(interpret=False, workers=triton_process.compilers()) as pool:
        indices = [
            item.callspec.params["index"]
            for item in request.session.items
            if item.path == request.path and "index" in item.fixturenames
        ]
        yield {i: pool.submit(triton_process.compile_by_index, i) for i in indices}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize(
    "index",
    [
        pytest.param(
            index,
            id=f"sm_{case.capability}-{case.name}",
            marks=[] if case.capability == 90 else pytest.mark.thorough,
        )
        for index, case in enumerate(CASES)
    ],
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
