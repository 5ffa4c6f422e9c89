"""The weights that cross_attention returns on request, and gradients with respect to them."""

import pytest
import torch
from fastvlp_tests.attention_cases import DTYPES, MASKS, NAMES, draw, run, segments, weights
from fastvlp_tests.tolerance import assert_as_accurate, epsilon
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlp.ops import cross_attention, cross_attention_reference


def exact_probs(case, causal=False):
    """[total_q, H, most keys] in float64."""
    parts = [weights(case, segment, causal)[1] for segment in segments(case)]
    most = max((p.shape[-1] for p in parts), default=0)
    padded = [torch.nn.functional.pad(p, (0, most - p.shape[-1])) for p in parts]
    return torch.cat([p.transpose(0, 1) for p in padded])


def with_probs(case, dtype=None, **options):
    """Output, weights, and the leaves they were computed from."""
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (case.q, case.k, case.v)]
    out, probs = cross_attention(
        *leaves, case.cu_q, case.cu_k, key_mask=case.key_mask, return_probs=True, **options
    )
    return out, probs, leaves


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("keys", [77, [77, 20, 0]])
@pytest.mark.parametrize("causal", [False, True])
def test_weights_and_output_match_float64(device, dtype, mask, keys, causal):
    case = draw([30, 0, 9], keys, dtype=dtype, device=device, mask=mask)
    out, probs, _ = with_probs(case, causal=causal)
    wanted = exact_probs(case, causal)
    assert probs.shape == wanted.shape
    # The weights in this dtype: rounded logits, as plain PyTorch has them.
    eager = []
    for rows, index, attended in segments(case):
        attended_k = case.k[index].masked_fill(~attended[:, None, None], 0)
        logits = 64**-0.5 * torch.einsum("qhd,khd->hqk", case.q[rows], attended_k)
        hidden = weights(case, (rows, index, attended), causal)[0] == -torch.inf
        p = logits.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0.0)
        eager.append(torch.nn.functional.pad(p, (0, wanted.shape[-1] - len(attended))))
    eager = torch.cat([p.transpose(0, 1) for p in eager])
    rounding = epsilon(dtype) * wanted.norm().item()
    assert_as_accurate("probs", probs.detach(), eager, wanted, rounding)
    reference = run(cross_attention_reference, case, causal=causal)
    exact = run(cross_attention_reference, case, torch.float64, causal=causal)
    rounding = epsilon(dtype) * exact.out.norm().item()
    assert_as_accurate("out", out.detach(), reference.out, exact.out, rounding)


@pytest.mark.parametrize("causal", [False, True])
def test_rows_sum_to_one_or_zero(device, causal):
    case = draw([30, 12, 9], [77, 5, 20], dtype=torch.float64, device=device, mask="holes")
    case.key_mask[77:82] = False
    _, probs, _ = with_probs(case, causal=causal)
    seeing = exact_probs(case, causal).any(-1)
    torch.testing.assert_close(probs.sum(-1), seeing.double())
    assert (~seeing[30:42]).all() and seeing[:30].any()
    assert (probs >= 0).all()


@pytest.mark.parametrize("keys", [20, [20, 7]])
def test_gradients_in_float64_are_the_reference_s(device, keys):
    case = draw([13, 4], keys, dim=8, dtype=torch.float64, device=device, mask="holes")
    out, _, leaves = with_probs(case)
    gradients = torch.autograd.grad(out, leaves, case.upstream)
    exact = run(cross_attention_reference, case)
    torch.testing.assert_close(out.detach(), exact.out)
    for name, gradient in zip(NAMES[1:], gradients, strict=True):
        torch.testing.assert_close(gradient, getattr(exact, name))


@pytest.mark.parametrize("keys", [20, [20, 7]])
def test_gradients_by_the_weights_for_gradcam(device, keys):
    """out = weights v, so the gradient w.r.t. a weight is the product of upstream and value."""
    case = draw([13, 4], keys, dim=8, dtype=torch.float64, device=device)
    out, probs, _ = with_probs(case)
    (found,) = torch.autograd.grad(out, probs, case.upstream)
    for rows, index, attended in segments(case):
        expected = torch.einsum("qhd,khd->qhk", case.upstream[rows], case.v[index])
        torch.testing.assert_close(found[rows][..., : len(attended)], expected)


def test_a_loss_on_the_weights_reaches_queries_and_keys(device):
    case = draw([4, 2], 5, dim=3, dtype=torch.float64, device=device, mask="holes")

    def entropy(q, k):
        _, probs = cross_attention(
            q, k, case.v, case.cu_q, key_mask=case.key_mask, return_probs=True
        )
        return probs.square().sum()

    inputs = (case.q.requires_grad_(), case.k.requires_grad_())
    assert torch.autograd.gradcheck(entropy, inputs)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_masked_keys_hold_does_not_matter(device, value):
    case = draw([13, 4], 20, device=device, mask="holes")
    clean = with_probs(case)
    for t in (case.k, case.v):
        t[~case.key_mask] = value
    dirty = with_probs(case)
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])
    gradients = torch.autograd.grad(dirty[0], dirty[2], case.upstream)
    expected = torch.autograd.grad(clean[0], clean[2], case.upstream)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


def test_weights_are_those_before_dropout_and_the_output_is_after_it(device):
    case = draw([13, 4], 20, dtype=torch.float64, device=device, mask="holes")
    _, plain, _ = with_probs(case)
    out, probs, leaves = with_probs(case, dropout_p=0.4, dropout_seed=3)
    assert torch.equal(plain, probs)
    exact = run(cross_attention_reference, case, dropout_p=0.4, dropout_seed=3)
    torch.testing.assert_close(out.detach(), exact.out)
    gradients = torch.autograd.grad(out, leaves, case.upstream)
    for name, gradient in zip(NAMES[1:], gradients, strict=True):
        torch.testing.assert_close(gradient, getattr(exact, name))


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 9), max_size=4),
    keys=st.integers(0, 12),
    mask=st.sampled_from(MASKS),
    causal=st.booleans(),
    seed=st.integers(0, 3),
)
def test_any_shape(device, lengths, keys, mask, causal, seed):
    case = draw(lengths, keys, dim=4, dtype=torch.float64, device=device, mask=mask, seed=seed)
    out, probs, _ = with_probs(case, causal=causal)
    assert probs.shape == (sum(lengths), 2, keys)
    if lengths:
        torch.testing.assert_close(probs.detach(), exact_probs(case, causal))
    exact = run(cross_attention_reference, case, causal=causal)
    torch.testing.assert_close(out.detach(), exact.out)
