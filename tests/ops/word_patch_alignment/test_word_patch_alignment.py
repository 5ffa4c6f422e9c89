"""word_patch_alignment against its float64 reference, and that against ViLT written out."""

import math

import pytest
import torch
from fastvlp_tests import instruction_sets
from fastvlp_tests.alignment_cases import (
    KINDS,
    Pairs,
    distance_rounding,
    entry_by_entry,
    exact,
    gradient_terms,
    opposite,
    pairs,
    run,
    sharpness,
)
from fastvlp_tests.tolerance import assert_as_accurate, epsilon
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlp.ops import (
    alignment_padding,
    word_patch_alignment,
    word_patch_alignment_loss,
    word_patch_alignment_reference,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SINGLE = epsilon(torch.float32)


def check(case, **kwargs):
    ours = run(word_patch_alignment, case, **kwargs)
    eager = run(word_patch_alignment_reference, case, **kwargs)
    true = exact(case, **kwargs)
    assert ours.distance.dtype == ours.plan.dtype == torch.float32
    growth = sharpness(**kwargs)
    assert_as_accurate(
        "distance", ours.distance, eager.distance, true.distance, distance_rounding(true)
    )
    assert_as_accurate("plan", ours.plan, eager.plan, true.plan, growth * true.plan.norm().item())
    for name, terms in zip(("text", "image"), gradient_terms(case, true.plan), strict=True):
        got, wanted = getattr(ours, name), getattr(true, name)
        assert got.dtype == case.text.dtype
        floor = growth * terms + epsilon(got.dtype) * wanted.norm().item()
        assert_as_accurate(name, got, getattr(eager, name), wanted, floor)
    for padding, gradient in ((case.text_padding, ours.text), (case.image_padding, ours.image)):
        assert (gradient[padding] == 0).all()
    outside = case.text_padding[:, :, None] | case.image_padding[:, None, :]
    assert (ours.plan[outside] == 0).all()
    return ours


@settings(max_examples=150)
@given(
    count=st.sampled_from([1, 2, 5]),
    words=st.sampled_from([1, 2, 3, 7, 12, 40]),
    patches=st.sampled_from([1, 5, 15, 16, 17, 50, 65]),
    dim=st.sampled_from([1, 2, 7, 16, 33, 64, 129]),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
    masks=st.sampled_from(["none", "lengths", "holes"]),
    scale=st.sampled_from([1.0, 1e-3, 300.0]),
    strided=st.booleans(),
    seed=st.integers(0, 5),
)
def test_matches_float64(device, count, words, patches, dim, dtype, **sampled):
    check(pairs(count, words, patches, dim, dtype, device, **sampled))


@settings(max_examples=40)
@given(
    beta=st.sampled_from([0.05, 0.1, 1.0, 7.5]),
    iterations=st.sampled_from([1, 2, 20, 120]),
    inner_iterations=st.sampled_from([1, 2, 5]),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 5),
)
def test_every_setting(device, kind, seed, **settings):
    check(pairs(2, 9, 33, 24, torch.float32, device, kind=kind, seed=seed), **settings)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_shape_of_vilt(device, dtype):
    case = pairs(3, 40, 200, 768, dtype, device)
    ours, eager = run(word_patch_alignment, case), run(word_patch_alignment_reference, case)
    true = exact(case)
    for name in ("distance", "plan", "text", "image"):
        wanted = getattr(true, name)
        # The results' own rounding alone: nothing else is exact by luck at this size.
        floor = SINGLE * wanted.norm().item()
        assert_as_accurate(name, getattr(ours, name), getattr(eager, name), wanted, floor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512_bf16"])
def test_every_instruction_set(monkeypatch, dtype, isa):
    instruction_sets.force(monkeypatch, isa)
    for shape in ((1, 1, 1, 1), (3, 7, 50, 19), (2, 33, 130, 96)):
        for kind in ("random", "matching"):
            check(pairs(*shape, dtype, kind=kind))


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e-4, 1e12, 1e30])
def test_extreme_features(device, scale):
    # From below the smallest norm to squares that leave the range of float32.
    check(pairs(3, 9, 30, 40, torch.float32, device, scale=scale))


def two_directions(words, opposite_words, patches, opposite_patches):
    text = torch.tensor([1.0] * words + [-1.0] * opposite_words)
    image = torch.tensor([1.0] * patches + [-1.0] * opposite_patches)
    return text[None, :, None], image[None, :, None]


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512_bf16"])
@pytest.mark.parametrize("counts", [(39, 1, 1, 64), (1, 8, 8, 1), (4, 1, 1, 4)])
def test_entries_that_leave_the_range_of_float32_come_back(monkeypatch, isa, counts):
    # Words and patches in two opposite directions. Where the shares of the directions differ, some
    # mass has to go across, at cost 2, through entries that start at exp(-50 k).
    instruction_sets.force(monkeypatch, isa)
    words, opposite_words, patches, opposite_patches = counts
    text, image = two_directions(*counts)
    nothing = [torch.zeros(side.shape[:2], dtype=torch.bool) for side in (text, image)]
    case, chosen = Pairs(text, image, *nothing, torch.ones(1)), {"beta": 0.04, "iterations": 300}
    ours, true = run(word_patch_alignment, case, **chosen), exact(case, **chosen)
    error = (ours.plan - true.plan).norm()
    assert error <= sharpness(**chosen) * true.plan.norm()
    # All mass on the same side but what does not fit there.
    share = words / (words + opposite_words) - patches / (patches + opposite_patches)
    assert true.distance.item() == pytest.approx(2 * abs(share), abs=1e-6)
    assert ours.distance.item() == pytest.approx(2 * abs(share), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("iterations", [300, 1000])
def test_entries_that_leave_the_range_of_float64_come_back(dtype, iterations):
    case = opposite(dtype)
    chosen = {"beta": 0.04, "iterations": iterations}
    ours, reference = (
        run(function, case, **chosen)
        for function in (word_patch_alignment, word_patch_alignment_reference)
    )
    # A third of the mass goes across at cost 2; with the third direction a quarter goes from there
    # at cost 1, and a sixth across.
    wanted = torch.tensor([1 / 4 + 2 / 6, 2 / 3, 2 / 3], dtype=torch.float64)
    # Logarithms of this size are rounded, and the results.
    rounding = torch.finfo(torch.float64).eps * 2 * iterations / 0.04 + 4 * torch.finfo(dtype).eps
    for found in (ours, reference):
        assert (found.distance.double() - wanted).abs().max() <= rounding
        for axis, padding in ((1, case.image_padding), (2, case.text_padding)):
            shares = (~padding).double()
            shares /= shares.sum(1, keepdim=True)
            assert (found.plan.double().sum(axis) - shares).abs().max() <= rounding


def test_a_compiled_reference_says_that_entries_were_lost():
    torch.compiler.reset()
    text, image = (t.double() for t in two_directions(39, 1, 1, 64))
    masks = [torch.zeros(side.shape[:2], dtype=torch.bool) for side in (text, image)]
    compiled = torch.compile(word_patch_alignment, fullgraph=True, backend="eager")
    for iterations, lost in ((3, False), (60, True)):
        chosen = {"beta": 0.01, "iterations": iterations}
        assert compiled(text, image, *masks, **chosen).isnan().item() == lost
        assert word_patch_alignment(text, image, *masks, **chosen).isfinite().all()


@pytest.mark.parametrize("masks", ["none", "lengths", "holes"])
def test_the_reference_is_vilt_written_out(masks):
    case = pairs(4, 5, 9, 6, torch.float64, masks=masks, seed=2)
    for chosen in ({}, {"beta": 0.2, "iterations": 7, "inner_iterations": 3}):
        found = word_patch_alignment_reference(case.text, case.image, *case.masks(), **chosen)
        keys = {"inner_iterations": "inner"}
        expected = entry_by_entry(case, **{keys.get(k, k): v for k, v in chosen.items()})
        torch.testing.assert_close(found, expected)


def test_reference_by_hand():
    # Two words equal to two patches: all mass goes to the matches, at no cost.
    text = torch.eye(2, dtype=torch.float64)[None]
    nothing = torch.zeros(1, 2, dtype=torch.bool)
    distance, plan = word_patch_alignment_reference(
        text, 3 * text, nothing, nothing, return_plan=True
    )
    torch.testing.assert_close(plan, torch.eye(2, dtype=torch.float64)[None] / 2)
    assert distance.item() == pytest.approx(0, abs=1e-12)
    # Orthogonal features: every plan costs 1.
    assert word_patch_alignment_reference(
        text[:, :1], text[:, 1:], nothing[:, :1], nothing[:, 1:]
    ).item() == pytest.approx(1)


def test_plans_have_uniform_margins(device):
    case = pairs(4, 12, 30, 16, torch.float32, device, masks="holes")
    _, plan = word_patch_alignment(case.text, case.image, *case.masks(), return_plan=True)
    words = (~case.text_padding).float()
    # sigma comes last: each word's row is exact, the columns converge to theirs.
    torch.testing.assert_close(plan.sum(2), words / words.sum(1, keepdim=True))
    torch.testing.assert_close(plan.sum((1, 2)), torch.ones(4, device=device))


@pytest.mark.parametrize("side", ["text", "image"])
def test_a_pair_without_a_side_is_at_no_distance(device, side):
    case = pairs(3, 6, 11, 8, torch.float32, device, masks="none")
    getattr(case, f"{side}_padding")[1] = True
    ours = check(case)
    assert ours.distance[1] == 0 and not ours.text[1].any() and not ours.image[1].any()
    assert ours.distance[0] > 0


@pytest.mark.parametrize("shape", [(0, 4, 5, 8), (2, 0, 5, 8), (2, 4, 0, 8)])
def test_empty_inputs(device, shape):
    ours = check(pairs(*shape, torch.float32, device, masks="none"))
    assert ours.distance.shape == shape[:1] and not ours.distance.any()


def test_nan_in_a_word_stays_in_its_pair(device):
    for value in (math.nan, math.inf):
        case = pairs(3, 6, 11, 8, torch.float32, device, masks="none")
        case.text[1, 2, 3] = value
        ours = run(word_patch_alignment, case)
        assert ours.distance.isnan().tolist() == [False, True, False]
        assert ours.image[1].isnan().any()
        assert not ours.text[0].isnan().any() and not ours.image[2].isnan().any()


def test_dying_entries_leave_no_trace(device):
    # Plans of tiny entries must not change how the process treats subnormal numbers afterwards.
    check(pairs(2, 12, 40, 16, torch.float32, device, kind="matching", masks="none"), beta=0.05)
    tiny = torch.tensor(1e-39)
    assert (tiny * 0.5).item() > 0


def test_bitwise_deterministic(device):
    for dtype in DTYPES:
        case = pairs(5, 20, 70, 48, dtype, device)
        first, second = run(word_patch_alignment, case), run(word_patch_alignment, case)
        for name in ("distance", "plan", "text", "image"):
            assert torch.equal(getattr(first, name), getattr(second, name)), (dtype, name)


def test_the_plan_is_held_fixed_and_carries_no_gradient(device):
    case = pairs(2, 5, 7, 6, torch.float64, device)
    for function in (word_patch_alignment, word_patch_alignment_reference):
        for dtype in (torch.float32, torch.float64):
            text = case.text.to(dtype).requires_grad_()
            distance, plan = function(text, case.image.to(dtype), *case.masks(), return_plan=True)
            assert distance.requires_grad and not plan.requires_grad
    kept = case.text.masked_fill(case.text_padding[..., None], 0).requires_grad_()
    image = case.image.masked_fill(case.image_padding[..., None], 0)
    cosine = torch.nn.functional.cosine_similarity(kept[:, :, None], image[:, None], dim=-1)
    (expected,) = torch.autograd.grad(((1 - cosine) * plan).sum(), kept)
    (found,) = torch.autograd.grad(distance.sum(), text)
    torch.testing.assert_close(found, expected)


def test_gradient_only_where_asked(device):
    case = pairs(2, 5, 7, 6, torch.float32, device)
    case.image.requires_grad_()
    word_patch_alignment(case.text, case.image, *case.masks()).sum().backward()
    assert case.text.grad is None and case.image.grad is not None
    assert not word_patch_alignment(case.text, case.text, *case.masks()[:1] * 2).requires_grad


def test_transposed_features_are_copied_not_misread(device):
    case = pairs(2, 5, 7, 6, torch.float32, device)
    case.text = case.text.mT.contiguous().mT
    check(case)


def test_second_derivative_is_refused(device):
    case = pairs(2, 5, 7, 6, torch.float32, device)
    text = case.text.requires_grad_()
    distance = word_patch_alignment(text, case.image, *case.masks())
    (gradient,) = torch.autograd.grad(distance.sum(), text, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative.*word_patch_alignment_reference"):
        gradient.sum().backward()


def test_the_loss_is_vilts():
    distance = torch.tensor([0.5, 0.25, 1.0, 2.0], requires_grad=True)
    is_positive = torch.tensor([True, False, False, True])
    loss = word_patch_alignment_loss(distance, is_positive)
    assert loss.item() == pytest.approx(0.1 * (0.5 + 2.0 - 0.25 - 1.0) / 4)
    loss.backward()
    assert distance.grad.tolist() == pytest.approx([0.025, -0.025, -0.025, 0.025])
    assert word_patch_alignment_loss(distance[:0], is_positive[:0]) == 0


def test_alignment_padding_leaves_out_the_special_tokens():
    words, patches = alignment_padding(torch.tensor([5, 2, 7, 0]), torch.tensor([1, 3, 4, 4]), 7, 4)
    kept = [row.nonzero().flatten().tolist() for row in ~words]
    assert kept == [[1, 2, 3], [], [1, 2, 3, 4, 5], []]
    kept = [row.nonzero().flatten().tolist() for row in ~patches]
    assert kept == [[], [1, 2], [1, 2, 3], [1, 2, 3]]
