"""The line of a test run's summary that says what became of the kernels."""

from types import SimpleNamespace

import pytest
from fastvlp_tests import kernel_counts as counts

pytest_plugins = ("pytester",)


def report(tell, when="call", nodeid="tests/test_a.py::test_kernel"):
    recorder = counts.Recorder(properties := [("compiled", "a row of the register table")])
    tell(recorder)
    return SimpleNamespace(when=when, nodeid=nodeid, user_properties=properties)


def test_cases_are_counted_by_kind_and_target():
    reports = [
        report(lambda r: r.compiled(120)),
        report(lambda r: r.interpreted()),
        report(lambda r: [r.executed(90, "one"), r.executed(90, "two"), r.executed(80)]),
        report(lambda r: r.compiled(90), nodeid="tests/test_a.py::test_kernel[one]"),
        report(lambda r: r.compiled(90), nodeid="tests/test_a.py::test_kernel[two]"),
    ]
    assert counts.summary(reports) == (
        "kernel cases: 1 interpreted, 3 executed as PTX (sm_80 1, sm_90 2), "
        "3 compiled (sm_90 2, sm_120 1)"
    )


def test_a_case_told_twice_counts_once():
    twice = report(lambda r: [r.interpreted("forward"), r.interpreted("forward")])
    assert counts.summary([twice]) == "kernel cases: 1 interpreted"


def test_a_named_case_of_two_tests_counts_once_for_each_target():
    first = report(lambda r: [r.executed(80, "a|b"), r.executed(90, "a|b")], nodeid="one")
    second = report(lambda r: [r.executed(80, "a|b"), r.executed(80, "a|c")], nodeid="two")
    assert counts.summary([first, second]) == ("kernel cases: 3 executed as PTX (sm_80 2, sm_90 1)")


def test_only_the_call_of_a_test_counts():
    tell = lambda r: r.launched()  # noqa: E731
    reports = [report(tell, when) for when in ("setup", "call", "teardown")]
    assert counts.summary(reports) == "kernel cases: 1 launched on a GPU"


def test_no_kernels_no_line():
    assert counts.summary([report(lambda r: None)]) == ""


@pytest.mark.parametrize("failing", [False, True])
def test_a_run_prints_the_line(pytester, request, failing):
    pytester.makeconftest((request.config.rootpath / "tests" / "conftest.py").read_text())
    pytester.makepyfile(f"""
        def test_kernel(kernel_counts):
            kernel_counts.executed(80)
            kernel_counts.executed(90)
            assert not {failing}
    """)
    run = pytester.runpytest_inprocess("--import-mode=importlib")
    run.assert_outcomes(passed=not failing, failed=failing)
    line = "kernel cases: 2 executed as PTX (sm_80 1, sm_90 1)"
    if failing:
        run.stdout.no_fnmatch_line("kernel cases:*")
    else:
        run.stdout.fnmatch_lines(line)
