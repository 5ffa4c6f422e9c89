"""Pairs that are nearly fitted: losses and gradients far below 1 keep their relative accuracy."""

import pytest
import torch
from fastvlp_tests.contrastive_cases import eager_contrastive, relative_errors, run, well_fitted
from fastvlp_tests.tolerance import epsilon
from torch.nn.functional import cross_entropy, normalize

from fastvlp.ops import (
    contrastive,
    contrastive_reference,
    sigmoid_contrastive,
    sigmoid_contrastive_reference,
)

ISAS = torch.ops.fastvlp.cpu_instruction_sets().split(",")
NAMES = ("loss", "image", "text", "scale")
# (scale, length of the images' features): logits of up to 30 and of up to 100, scales 1 to 100.
SIZES = [(1.0, 30.0), (10.0, 3.0), (30.0, 1.0), (100.0, 1.0)]
TARGETS = [1e-8, 1e-6, 9e-5, 1e-2, 1.0, 10.0]
DRAWS = 4
SINGLE = epsilon(torch.float32)


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("FASTVLP_CPU_ISA", request.param)


@pytest.fixture(scope="module")
def cases():
    """By (scale, norm) and loss: draws, exact results, errors of eager and of rounding logits."""
    found = {}
    for scale, norm in SIZES:
        for target in TARGETS:
            draws = [well_fitted(70 + i, 128, scale, norm, target, i) for i in range(DRAWS)]
            exact = [run(contrastive_reference, *d, scale, 0.0, torch.float64) for d in draws]
            assert all(e.loss == pytest.approx(target, rel=0.05) for e in exact)
            eager = [run(eager_contrastive, *d, scale, 0.0) for d in draws]
            errors = relative_errors(eager, exact, NAMES)
            rounded = [run(rounded_logits, *d, scale, 0.0, torch.float64) for d in draws]
            rounding = relative_errors(rounded, exact, NAMES)
            found[scale, norm, target] = draws, exact, errors, rounding
    return found


def rounded_logits(image, text, scale, bias):
    """The loss of float64 inputs with float32 products and logits, and nothing else rounded."""
    logits = scale * image @ text.T + bias
    single = scale.float() * image.float() @ text.float().T + bias
    logits = logits + (single.double() - logits).detach()
    pairs = torch.arange(len(image))
    return (cross_entropy(logits, pairs) + cross_entropy(logits.T, pairs)) / 2


def check(cases, loss, float_statistics=False, **kwargs):
    """Never more than twice eager's error, for a small loss a tenth or the rounding of logits.

    The roundings after the logits may add eight units in the last place.
    """
    for (scale, norm, target), (draws, exact, eager, rounding) in cases.items():
        ours = relative_errors([run(loss, *d, scale, 0.0, **kwargs) for d in draws], exact, NAMES)
        for name in NAMES:
            allowed = 2 * eager[name] + SINGLE  # one rounding of the result
            if float_statistics and name == "scale":  # terms of both signs, their rounding shared
                allowed = max(allowed, SINGLE * scale * norm / 4)
            if target < 1e-4:
                allowed = min(allowed, max(eager[name] / 10, rounding[name] + 8 * SINGLE))
            assert ours[name] <= allowed, (scale, norm, target, name, ours[name], eager[name])


def test_every_instruction_set(isa, cases):
    check(cases, contrastive)


def test_logits_computed_again(cases):
    check(cases, contrastive, workspace_bytes=1)


def test_reference(cases):
    check(cases, contrastive_reference, float_statistics=True)


@pytest.mark.parametrize("direction", ["image_to_text", "text_to_image"])
def test_one_direction(direction):
    image, text = well_fitted(70, 128, 30.0, 1.0, 1e-6)
    ours, exact = (
        run(function, image, text, 30.0, 0.0, dtype, direction=direction)
        for function, dtype in ((contrastive, None), (contrastive_reference, torch.float64))
    )
    errors = relative_errors([ours], [exact], NAMES)
    assert max(errors.values()) < 1e-5, errors


def test_one_pair_has_no_loss(isa):
    result = run(contrastive, torch.ones(1, 3), torch.ones(1, 3), 10.0, 0.0)
    assert result.loss == 0 and result.scale == 0
    assert not result.image.any() and not result.text.any()


@pytest.mark.parametrize("n", [33, 101])
def test_bfloat16_gradients_are_finite_at_any_size(isa, n):
    # Log-sum-exps near 88 next to lanes of padding, whose exponentials must not overflow.
    for seed, cosine in enumerate((0.86, 0.87, 0.88)):
        g = torch.Generator().manual_seed(seed)
        image, other = (torch.randn(n, 512, generator=g) for _ in range(2))
        image = normalize(image, dim=1)
        other = normalize(other - (other * image).sum(1, keepdim=True) * image, dim=1)
        text = cosine * image + (1 - cosine**2) ** 0.5 * other
        for dtype in (torch.bfloat16, torch.float32):
            features = normalize(image, dim=1).to(dtype), normalize(text, dim=1).to(dtype)
            result = run(contrastive, *features, 100.0, 0.0)
            for name in NAMES:
                assert getattr(result, name).isfinite().all(), (cosine, dtype, name)


@pytest.mark.parametrize("scale, bias", [(34.0, -17.0), (40.0, -20.0), (60.0, -30.0), (8.0, -4.0)])
def test_sigmoid_of_fitted_pairs(isa, scale, bias):
    # Every logit is scale / 2 from 0, on the right side.
    image = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))[0]
    names = (*NAMES, "bias")
    ours, eager, exact = (
        run(function, image, image.clone(), scale, bias, dtype)
        for function, dtype in (
            (sigmoid_contrastive, None),
            (sigmoid_contrastive_reference, None),
            (sigmoid_contrastive_reference, torch.float64),
        )
    )
    ours, eager = (relative_errors([each], [exact], names) for each in (ours, eager))
    for name in names:
        allowed = 2 * eager[name] + SINGLE * scale / 2  # the rounding of the logits
        assert ours[name] <= allowed, (name, ours[name], eager[name])
