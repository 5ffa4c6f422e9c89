"""`pytest -n 2`: files stay whole, processes share the cores, and their kernel cases add up."""

import pytest

pytest_plugins = ("pytester",)

TESTS = """
import os
import pathlib

import pytest
import torch

MADE = pathlib.Path({made!r})


@pytest.fixture(scope="module")
def costly(request):
    with MADE.open("a") as file:
        file.write(f"{{request.module.__name__}}\\n")


@pytest.mark.parametrize("number", range(5))
def test_kernel(costly, kernel_counts, number):
    kernel_counts.interpreted()
    assert os.environ["PYTEST_XDIST_WORKER_COUNT"] == "2"
    assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"]) == 4
"""


@pytest.mark.thorough
def test_two_processes(pytester, request, monkeypatch):
    pytest.importorskip("xdist")
    # Not as a part of the run that this test may be in.
    for variable in ("OMP_NUM_THREADS", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
        monkeypatch.delenv(variable, raising=False)
    # As if the machine had eight cores.
    conftest = (request.config.rootpath / "tests" / "conftest.py").read_text()
    pytester.makeconftest(f"{conftest}\n\ntorch.set_num_threads(8)\n")
    made = pytester.path / "made"
    made.touch()
    text = TESTS.format(made=str(made))
    pytester.makepyfile(test_one=text, test_two=text, test_three=text)
    run = pytester.runpytest_inprocess("-n", "2", "--import-mode=importlib")
    run.assert_outcomes(passed=15)
    run.stdout.fnmatch_lines("kernel cases: 15 interpreted")
    assert sorted(made.read_text().split()) == ["test_one", "test_three", "test_two"]
