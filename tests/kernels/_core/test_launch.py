"""Launches by what Triton has compiled already, on a GPU that is not there."""

import pytest
from fastvlp_tests import launches, triton_process


@pytest.fixture(scope="module")
def pool():
    with triton_process.start(interpret=False, workers=1) as started:
        yield started


def test_results_are_those_of_the_kernel(pool):
    for count in (5, 300):
        launched = [(count, 3.0), (count, -0.5)]
        right, compiled_anew = pool.submit(launches.scaled, "scale_kernel", launched).result()
        assert right and compiled_anew == [True, False]


def test_a_kernel_is_compiled_for_the_integers_that_it_is_specialised_for(pool):
    launched = [(count, 3.0) for count in (5, 1, 304, 7, 1, 16, 300)]
    right, compiled_anew = pool.submit(
        launches.scaled, "specialised_scale_kernel", launched
    ).result()
    assert right and compiled_anew == [True, True, True, False, False, False, False]


@pytest.mark.parametrize(
    "change", ["dtype", "alignment", "constant", "option", "wide integer", "device"]
)
def test_another_kind_of_arguments_is_compiled_anew(pool, change):
    first, second = pool.submit(launches.kernels_of_a_change, change).result()
    assert first != second


def test_another_number_is_not(pool):
    first, second = pool.submit(launches.kernels_of_a_change, "number").result()
    assert first == second


@pytest.mark.parametrize(
    "change, message",
    [
        ("order", "expected the arguments .'x_ptr', .*in this order, got .*'factor', 'count'"),
        ("missing", "expected the arguments"),
    ],
)
def test_other_arguments_than_the_kernels_are_refused(pool, change, message):
    with pytest.raises(ValueError, match=message):
        pool.submit(launches.refused, change).result()
