"""Dropout of cross_attention: a mask that is a function of seed and position alone."""

import math

import pytest
import torch
from fastvlp_tests.attention_cases import DTYPES, NAMES, check, cumulative, draw, run

from fastvlp.ops import cross_attention

HEADS, KEYS = 4, 64


def kept_weights(device, p, seed, rows=300, dtype=torch.float32, lengths=None):
    """Which weights stay, [rows, heads, keys]: equal logits and unit vectors for values."""
    lengths = lengths or [rows]
    q = torch.zeros(sum(lengths), HEADS, KEYS, dtype=dtype, device=device)
    k = torch.zeros(len(lengths), KEYS, HEADS, KEYS, dtype=dtype, device=device)
    unit = torch.eye(KEYS, dtype=dtype, device=device)
    v = unit[None, :, None].expand(len(lengths), -1, HEADS, -1)
    cu = cumulative(lengths, device=device)
    out = cross_attention(q, k, v, cu, dropout_p=p, dropout_seed=seed)
    return out != 0, out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_rate_and_mean(device, dtype, p):
    kept, out = kept_weights(device, p, seed=1, dtype=dtype)
    count = kept.numel()
    sigma = math.sqrt(p * (1 - p) / count)
    assert abs(kept.double().mean().item() - (1 - p)) < 5 * sigma
    # What stays is scaled by 1 / (1 - p), so that the mean over masks is the weight itself.
    expected = 1 / KEYS / (1 - p)
    scaled = out[kept].double()
    assert (scaled - expected).abs().max().item() <= expected * torch.finfo(dtype).eps
    per_head = kept.double().mean((0, 2))
    assert (per_head - (1 - p)).abs().max().item() < 5 * sigma * math.sqrt(HEADS)
    per_key = kept.double().mean((0, 1))
    assert (per_key - (1 - p)).abs().max().item() < 5 * sigma * math.sqrt(KEYS)


def test_rows_heads_keys_and_images_are_independent(device):
    kept, _ = kept_weights(device, 0.5, seed=3, lengths=[150, 150])
    signs = kept.double() * 2 - 1
    pairs = {
        "heads": (signs[:, 0], signs[:, 1]),
        "rows": (signs[1:], signs[:-1]),
        "keys": (signs[..., 1:], signs[..., :-1]),
        "keys four apart": (signs[..., 4:], signs[..., :-4]),
        "images": (signs[:150], signs[150:]),
    }
    for name, (one, other) in pairs.items():
        assert abs((one * other).mean().item()) < 5 / math.sqrt(one.numel()), name


def test_the_seed_decides(device):
    first, _ = kept_weights(device, 0.3, seed=11)
    again, _ = kept_weights(device, 0.3, seed=11)
    tensor, _ = kept_weights(device, 0.3, seed=torch.tensor(11, device=device))
    assert torch.equal(first, again) and torch.equal(first, tensor)
    for seed in (12, 11 + (1 << 32), -11, 0):
        other, _ = kept_weights(device, 0.3, seed=seed)
        agreement = (first == other).double().mean().item()
        expected = 0.7**2 + 0.3**2
        assert abs(agreement - expected) < 5 * math.sqrt(0.25 / first.numel()), seed


def test_without_a_seed_torch_s_generator_decides(device):
    torch.manual_seed(5)
    first, _ = kept_weights(device, 0.3, seed=None)
    second, _ = kept_weights(device, 0.3, seed=None)
    torch.manual_seed(5)
    again, _ = kept_weights(device, 0.3, seed=None)
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_a_mask_grows_with_p(device):
    # The same words against a higher threshold: what is dropped at 0.1 is dropped at 0.4.
    little, _ = kept_weights(device, 0.1, seed=2)
    much, _ = kept_weights(device, 0.4, seed=2)
    assert not (much & ~little).any() and (little & ~much).any()


def test_no_dropout_needs_no_seed_and_changes_no_bit(device):
    case = draw([30, 7], 70, device=device)
    plain = run(cross_attention, case)
    seeded = run(cross_attention, case, dropout_p=0.0, dropout_seed=3)
    for name in NAMES:
        assert torch.equal(getattr(plain, name), getattr(seeded, name))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("keys", [577, [577, 130, 3]])
def test_gradients_use_the_mask_of_the_output(device, dtype, p, keys):
    case = draw([30, 129, 7], keys, heads=3, dtype=dtype, device=device, mask="holes")
    check(case, dropout_p=p, dropout_seed=1 << 35)


@pytest.mark.parametrize("dtype", DTYPES)
def test_causal_with_dropout(device, dtype):
    case = draw([30, 65, 7], [30, 65, 7], dtype=dtype, device=device)
    check(case, dropout_p=0.2, dropout_seed=4, causal=True)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_finite_differences_in_float64(device, p):
    case = draw([3, 4], [5, 3], dim=3, dtype=torch.float64, device=device, mask="holes")
    leaves = [t.requires_grad_() for t in (case.q, case.k, case.v)]

    def call(*tensors):
        return cross_attention(
            *tensors, case.cu_q, case.cu_k, key_mask=case.key_mask, dropout_p=p, dropout_seed=9
        )

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("keys", [70, [70, 9]])
def test_the_kernel_s_gradient_is_the_slope_of_its_output(device, keys):
    """Directional derivatives of the float32 output, differenced in float64: the mask of the
    backward pass is the one of the forward pass."""
    case = draw([30, 17], keys, dim=16, device=device)
    options = {"dropout_p": 0.3, "dropout_seed": 6}
    ours = run(cross_attention, case, **options)
    other_seed = run(cross_attention, case, dropout_p=0.3, dropout_seed=7)
    generator = torch.Generator().manual_seed(1)
    for name in ("q", "k", "v"):
        at = getattr(case, name)
        direction = torch.randn(at.shape, generator=generator).to(device)
        step = 2**-7
        values = []
        for sign in (1, -1):
            moved = type(case)(**(vars(case) | {name: at + sign * step * direction}))
            out = run(cross_attention, moved, **options).out.double()
            values.append((out * case.upstream.double()).sum())
        estimate = ((values[0] - values[1]) / (2 * step)).item()
        found = (getattr(ours, name).double() * direction.double()).sum().item()
        wrong = (getattr(other_seed, name).double() * direction.double()).sum().item()
        assert abs(found - estimate) < 0.02 * abs(wrong - estimate), name


def test_the_mask_does_not_depend_on_the_dtype_or_the_layout(device):
    first, _ = kept_weights(device, 0.3, seed=8)
    for dtype in DTYPES:
        kept, _ = kept_weights(device, 0.3, seed=8, dtype=dtype)
        assert torch.equal(first, kept), dtype
    apart, _ = kept_weights(device, 0.3, seed=8, lengths=[100, 0, 137, 63])
    assert torch.equal(first, apart)


def test_a_seed_on_the_device_can_change_between_calls(device):
    seed = torch.tensor(1, device=device)
    first, _ = kept_weights(device, 0.3, seed)
    seed += 1
    second, _ = kept_weights(device, 0.3, seed)
    assert not torch.equal(first, second)
    assert torch.equal(second, kept_weights(device, 0.3, 2)[0])


def test_changing_the_seed_in_place_between_forward_and_backward_is_an_error_or_harmless(device):
    case = draw([30], 70, device=device)
    expected = run(cross_attention, case, dropout_p=0.3, dropout_seed=1)
    seed = torch.tensor(1, device=device)
    q = case.q.detach().requires_grad_()
    out = cross_attention(q, case.k, case.v, case.cu_q, dropout_p=0.3, dropout_seed=seed)
    seed += 1
    try:
        (gradient,) = torch.autograd.grad(out, q, case.upstream)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        assert torch.equal(gradient, expected.q)
