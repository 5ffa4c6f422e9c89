"""How errors are judged, and other draws of inputs (fastvlp_tests.tolerance, .seeds)."""

import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastvlp_tests import gloo_ranks, seeds
from fastvlp_tests.tolerance import (
    AddedTerms,
    TooInaccurate,
    assert_as_accurate,
    epsilon,
    judge_over_draws,
)


def compare(error, near=1.0, name="x"):
    """A comparison with these errors."""
    exact = torch.zeros(1, dtype=torch.float64)
    assert_as_accurate(name, torch.tensor([error]), torch.tensor([near]), exact)


def first_seed():
    """What a seed of 0 is on the present draw."""
    torch.manual_seed(0)
    return torch.initial_seed()


def test_one_unlucky_draw_does_not_decide(pytestconfig):
    # Alone this misses the measure; conftest.py has it judged with four more draws.
    compare(3.0 if first_seed() == pytestconfig.getoption("--seed-offset") else 1.0)


def test_draws_that_all_miss_fail():
    with pytest.raises(AssertionError, match=r"x: root mean square error of 5 draws 2.1.*2.000e"):
        judge_over_draws(lambda: compare(2.1), TooInaccurate("first"))


def test_an_error_far_above_the_others_fails():
    start = first_seed()
    with pytest.raises(AssertionError, match="5 draws"):
        judge_over_draws(
            lambda: compare(10.0 if first_seed() == start else 1.0), TooInaccurate("first")
        )


def test_comparisons_of_one_name_are_judged_each_for_itself():
    def test():
        compare(1.0)
        compare(3.0)

    with pytest.raises(AssertionError, match="3.000e"):
        judge_over_draws(test, TooInaccurate("first"))


def test_a_repetition_that_raises_leaves_the_first_failure():
    def test():
        compare(float("nan"))

    with pytest.raises(TooInaccurate, match="first"):
        judge_over_draws(test, TooInaccurate("first"))
    with pytest.raises(TooInaccurate, match="x: error 3.000e"):
        compare(3.0)


def test_an_offset_shifts_every_seed():
    def draws(seed):
        torch.manual_seed(seed)
        yield torch.rand(3)
        yield torch.rand(3, generator=torch.Generator().manual_seed(seed))
        yield torch.from_numpy(np.random.default_rng(seed).random(3))

    wanted, before = list(draws(12)), list(draws(7))
    with seeds.shifted(2), seeds.shifted(3):
        found = list(draws(7))
    for ours, theirs, plain in zip(found, wanted, before, strict=True):
        assert torch.equal(ours, theirs) and not torch.equal(ours, plain)
    assert all(map(torch.equal, draws(7), before))


def sample():
    return torch.rand(3, generator=torch.Generator().manual_seed(1)).tolist()


SAMPLED_AT_IMPORT = sample()


def drawn_on_a_rank(rank):
    return SAMPLED_AT_IMPORT, sample(), os.environ.get(seeds.VARIABLE)


def test_ranks_draw_what_the_test_draws():
    with seeds.shifted(2), seeds.shifted(3):
        wanted, total = sample(), os.environ[seeds.VARIABLE]
        found = gloo_ranks.run(2, drawn_on_a_rank)
    assert found == [(wanted, wanted, total)] * 2
    assert sample() != wanted


def test_a_process_without_an_offset_inherits_none(monkeypatch):
    monkeypatch.delenv(seeds.VARIABLE, raising=False)
    before = sample()
    seeds.inherit()
    assert sample() == before
    with seeds.shifted(4):
        assert os.environ[seeds.VARIABLE] == "4"
    assert seeds.VARIABLE not in os.environ


def test_terms_of_a_bias_are_added_over_rows_and_uses():
    layer = torch.nn.Linear(2, 3)
    x = torch.randn(4, 5, 2)
    first, second = torch.randn(4, 5, 3), torch.randn(5, 3)
    with AddedTerms() as terms:
        (layer(x) * first).sum().backward()
        (layer(x[0]) * second).sum().backward()
    wanted = first.abs().sum((0, 1)) + second.abs().sum(0)
    torch.testing.assert_close(terms.of(layer.bias), wanted)


def test_terms_bound_a_gradient_that_is_zero_in_exact_arithmetic():
    key, x, q = torch.nn.Linear(8, 8), torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    upstream = torch.randn(2, 6, 8)

    def gradient():
        out = F.softmax(q.to(key.weight) @ key(x.to(key.weight)).mT, -1) @ upstream.to(key.weight)
        (out * upstream).sum().backward()
        found, key.bias.grad = key.bias.grad, None
        return found.double()

    single = gradient()
    key.double()
    with AddedTerms() as terms:
        exact = gradient()
    assert exact.norm() < 1e-12
    assert 0 < single.norm() <= epsilon(torch.float32) * terms.of(key.bias).norm()
