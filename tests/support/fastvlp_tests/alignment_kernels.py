"""The checks of the word-patch alignment kernels against the float64 reference."""

import pytest
import torch

from fastvlp.ops import word_patch_alignment_reference
from fastvlp_tests.alignment_cases import (
    distance_rounding,
    exact,
    gradient_terms,
    opposite,
    run,
    sharpness,
)
from fastvlp_tests.tolerance import assert_as_accurate, epsilon

MODULE = "word_patch_alignment.transport"


def check(run_kernel, case, beta=0.5, iterations=50, inner=1):
    names = {"beta": beta, "iterations": iterations, "inner_iterations": inner}
    distance, plan, x_rows, y_rows = run_kernel(
        MODULE, "word_patch_alignment", case.text, case.image, *case.masks(), beta=beta,
        iterations=iterations, inner=inner,
    )  # fmt: skip
    gradients = run_kernel(
        "word_patch_alignment.gradients", "word_patch_alignment_gradients", case.upstream,
        case.text, case.image, plan, x_rows, y_rows,
    )  # fmt: skip
    eager = run(word_patch_alignment_reference, case, **names)
    true = exact(case, **names)
    growth = sharpness(beta, iterations)
    assert_as_accurate("distance", distance, eager.distance, true.distance, distance_rounding(true))
    assert_as_accurate("plan", plan, eager.plan, true.plan, growth * true.plan.norm().item())
    for name, got, terms in zip(
        ("text", "image"), gradients, gradient_terms(case, true.plan), strict=True
    ):
        assert got.dtype == case.text.dtype
        wanted = getattr(true, name)
        floor = growth * terms + epsilon(got.dtype) * wanted.norm().item()
        assert_as_accurate(name, got, getattr(eager, name), wanted, floor)
        assert (got[getattr(case, f"{name}_padding")] == 0).all()
    return distance, plan, *gradients


def check_lost_entries(run_kernel, device, beta, iterations, dtype=torch.float32):
    """A plan of which entries die out in float32, and some of them in float64."""
    case = opposite(dtype, device)
    distance, plan, *_ = run_kernel(
        MODULE, "word_patch_alignment", case.text, case.image, *case.masks(), beta=beta,
        iterations=iterations,
    )  # fmt: skip
    true = exact(case, beta=beta, iterations=iterations)
    rounding = sharpness(beta, iterations)
    assert true.distance[1:].cpu().tolist() == pytest.approx([2 / 3] * 2, abs=1e-6)
    assert (distance - true.distance).abs().max() <= rounding
    assert (plan - true.plan).norm() <= rounding * true.plan.norm()
