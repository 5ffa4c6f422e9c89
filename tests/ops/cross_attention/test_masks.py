"""Key masks and causality of cross_attention: what is masked must not matter."""

import pytest
import torch
from fastvlp_tests.attention_cases import (
    DTYPES,
    MASKS,
    NAMES,
    check,
    cumulative,
    draw,
    run,
    without,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlp.ops import cross_attention

NOT_NUMBERS = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("keys", [577, [577, 240, 40]])
def test_masks(device, dtype, mask, keys):
    case = draw([30, 25, 61], keys, dtype=dtype, device=device, mask=mask)
    ours = check(case)
    if mask is not None:
        assert not ours.k[~case.key_mask].any() and not ours.v[~case.key_mask].any()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("keys", [150, [150, 20, 33]])
def test_an_all_true_mask_is_no_mask(device, causal, keys):
    case = draw([30, 25, 61], keys, device=device)
    plain = run(cross_attention, case, causal=causal)
    every = torch.ones(case.k.shape[:-2], dtype=torch.bool, device=device)
    masked = run(cross_attention, without(case, key_mask=every), causal=causal)
    for name in NAMES:
        assert torch.equal(getattr(plain, name), getattr(masked, name)), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", [70, [70, 70, 70]])
def test_a_fully_masked_image_gives_zero_and_zero_gradients(device, dtype, keys):
    case = draw([30, 7, 12], keys, dtype=dtype, device=device, mask="holes")
    middle = slice(1, 2) if isinstance(keys, int) else slice(70, 140)
    case.key_mask[middle] = False
    ours = check(case)
    for name, where in (("out", slice(30, 37)), ("q", slice(30, 37)), ("k", middle), ("v", middle)):
        assert not getattr(ours, name)[where].any(), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_image_fully_masked(device, dtype):
    case = draw([30, 7], 70, dtype=dtype, device=device, mask="holes")
    case.key_mask[:] = False
    ours = run(cross_attention, case)
    assert not any(getattr(ours, name).any() for name in NAMES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", NOT_NUMBERS)
@pytest.mark.parametrize("keys", [197, [197, 40, 7]])
@pytest.mark.parametrize("mask", ["holes", "middle", "prefix"])
def test_what_masked_keys_and_values_hold_does_not_matter(device, dtype, value, keys, mask):
    case = draw([30, 9, 3], keys, dtype=dtype, device=device, mask=mask)
    clean = run(cross_attention, case)
    for t in (case.k, case.v):
        t[~case.key_mask] = value
    dirty = run(cross_attention, case)
    for name in NAMES:
        assert torch.equal(getattr(clean, name), getattr(dirty, name)), name


@pytest.mark.parametrize("value", NOT_NUMBERS)
def test_not_numbers_in_a_fully_masked_image(device, value):
    case = draw([30, 9], 70, device=device, mask="holes")
    case.key_mask[1] = False
    case.k[1], case.v[1] = value, value
    ours = check(case)
    assert not ours.out[30:].any() and not ours.q[30:].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_segment_does_not_reach_its_neighbours(device, dtype, value):
    case = draw([30, 20, 31], [30, 20, 31], dtype=dtype, device=device)
    clean = run(cross_attention, case)
    for t in (case.q, case.k, case.v):
        t[30:50] = value
    dirty = run(cross_attention, case)
    for name in NAMES:
        for rows in (slice(0, 30), slice(50, 81)):
            assert torch.equal(getattr(clean, name)[rows], getattr(dirty, name)[rows]), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, "holes"])
def test_packed_self_attention(device, dtype, causal, mask):
    lengths = [30, 5, 0, 1, 17, 77, 130, 22]
    check(draw(lengths, lengths, dtype=dtype, device=device, mask=mask), causal=causal)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "q_lengths, keys",
    [
        ([5, 30], 77),
        ([77, 3], 30),
        ([1, 1], 40),
        ([200, 1], [3, 150]),
        ([7, 7], [8, 6]),
        ([129, 64], [129, 65]),
    ],
)
def test_causal_is_aligned_at_the_last_key(device, dtype, q_lengths, keys):
    case = draw(q_lengths, keys, dtype=dtype, device=device)
    ours = check(case, causal=True)
    starts = case.cu_q.tolist()
    for i, rows in enumerate(q_lengths):
        count = keys if isinstance(keys, int) else keys[i]
        blind = max(0, rows - count)  # the first rows come before the first key
        assert not ours.out[starts[i] : starts[i] + blind].any()
        assert not ours.q[starts[i] : starts[i] + blind].any()


def test_a_packed_segment_is_an_image_of_its_own(device):
    """Packed keys of equal lengths are the four-dimensional keys, flattened."""
    images = draw([30, 0, 25], 50, device=device, mask="holes")
    packed = without(
        images,
        k=images.k.flatten(0, 1),
        v=images.v.flatten(0, 1),
        key_mask=images.key_mask.flatten(),
        cu_k=cumulative([50] * 3, device=device),
    )
    one, other = run(cross_attention, images), run(cross_attention, packed)
    for name in NAMES:
        assert torch.equal(getattr(one, name).flatten(), getattr(other, name).flatten()), name


def test_a_mask_of_any_layout(device):
    case = draw([30, 7], 70, device=device, mask="holes")
    plain = run(cross_attention, case)
    wide = torch.ones(2, 140, dtype=torch.bool, device=device)
    wide[:, ::2] = case.key_mask
    expanded = case.key_mask[:1].expand(2, -1)
    strided = run(cross_attention, without(case, key_mask=wide[:, ::2]))
    assert torch.equal(plain.out, strided.out) and torch.equal(plain.k, strided.k)
    check(without(case, key_mask=expanded))


@settings(max_examples=60)
@given(st.lists(st.lists(st.booleans(), max_size=20), min_size=1, max_size=4), st.booleans())
def test_masked_keys_are_as_if_they_were_not_there(device, pattern, causal):
    lengths = [len(row) for row in pattern]
    case = draw([6] * len(pattern), lengths, dim=8, device=device, mask="holes")
    flat = [attended for row in pattern for attended in row]
    case = without(case, key_mask=torch.tensor(flat, dtype=torch.bool, device=device))
    check(case, causal=causal)
    kept = without(
        case,
        k=case.k[case.key_mask],
        v=case.v[case.key_mask],
        key_mask=None,
        cu_k=cumulative([sum(row) for row in pattern], device=device),
    )
    if not causal:  # removing a key would move the alignment
        whole, short = check(case), check(kept)
        assert not whole.k[~case.key_mask].any()
        assert whole.k[case.key_mask].shape == short.k.shape
