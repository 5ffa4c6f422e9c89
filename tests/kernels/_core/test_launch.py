"""Launches by what Triton has compiled already, on a GPU that is not there."""

import pytest
from fastvlp_tests import launches


def test_results_are_those_of_the_kernel(compiler):
    for count in (5, 300):
        launched = [(count, 3.0), (count, -0.5)]
        right, compiled_anew = compiler.submit(launches.scaled, "scale_kernel", launched).result()
        assert right and compiled_anew == [True, False]


def test_a_kernel_is_compiled_for_the_integers_that_it_is_specialised_for(compiler):
    launched = [(count, 3.0) for count in (5, 1, 304, 7, 1, 16, 300)]
    right, compiled_anew = compiler.submit(
        launches.scaled, "specialised_scale_kernel", launched
    ).result()
    assert right and compiled_anew == [True, True, True, False, False, False, False]


@pytest.mark.parametrize(
    "change", ["dtype", "alignment", "constant", "option", "wide integer", "device"]
)
def test_another_kind_of_arguments_is_compiled_anew(compiler, change):
    first, second = compiler.submit(launches.kernels_of_a_change, change).result()
    assert first != second


def test_another_number_is_not(compiler):
    first, second = compiler.submit(launches.kernels_of_a_change, "number").result()
    assert first == second


@pytest.mark.parametrize(
    "change, message",
    [
        ("order", "expected the arguments .'x_ptr', .*in this order, got .*'factor', 'count'"),
        ("missing", "expected the arguments"),
    ],
)
def test_other_arguments_than_the_kernels_are_refused(compiler, change, message):
    with pytest.raises(ValueError, match=message):
        compiler.submit(launches.refused, change).result()
