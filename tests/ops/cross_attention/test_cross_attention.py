"""cross_attention against its float64 reference: shapes, dtypes, layouts, scales, CPUs."""

from dataclasses import replace

import pytest
import torch
from fastvlp_tests.attention_cases import DTYPES, LAYOUTS, MASKS, NAMES, check, draw, run
from fastvlp_tests.tolerance import assert_as_accurate, epsilon
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlp.ops import cross_attention, cross_attention_reference

INSTRUCTION_SETS = torch.ops.fastvlp.cpu_instruction_sets().split(",")
LENGTHS = st.lists(st.integers(0, 40), min_size=0, max_size=5)


@st.composite
def cases(draws, longest=None):
    """Any case, with the options of the call."""
    dtype = draws(st.sampled_from(DTYPES))
    q_lengths = draws(LENGTHS)
    if longest is not None:
        q_lengths = draws(st.lists(st.integers(0, longest), min_size=1, max_size=3))
    most = longest or 70
    keys = draws(
        st.one_of(
            st.integers(0, most),
            st.lists(st.integers(0, most), min_size=len(q_lengths), max_size=len(q_lengths)),
        )
    )
    options = {
        "causal": draws(st.booleans()),
        "scale": draws(st.sampled_from([None, 0.3, 1.0])),
        "dropout_p": draws(st.sampled_from([0.0, 0.0, 0.1, 0.6])),
        "dropout_seed": draws(st.sampled_from([0, 7, 1 << 40])),
    }
    case = draw(
        q_lengths,
        keys,
        heads=draws(st.sampled_from([1, 2, 3])),
        dim=draws(st.sampled_from([1, 2, 7, 16, 32, 40, 64, 88])),
        dtype=dtype,
        device="cpu",
        mask=draws(st.sampled_from(MASKS)),
        layout=draws(st.sampled_from(LAYOUTS)),
        cu_dtype=draws(st.sampled_from([torch.int32, torch.int64])),
        seed=draws(st.integers(0, 5)),
    )
    return case, options


def on(device, case):
    moved = {n: t if t is None else t.to(device) for n, t in vars(case).items()}
    return type(case)(**moved)


@settings(max_examples=100)
@given(cases())
def test_matches_float64(device, sampled):
    case, options = sampled
    check(on(device, case), **options)


@settings(max_examples=20)
@given(cases(longest=260))
def test_matches_float64_beyond_one_tile(device, sampled):
    case, options = sampled
    check(on(device, case), **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, 30, 128, 129, 1000])
@pytest.mark.parametrize("keys", [1, 197, 257, 576, 577, 1025])
def test_query_and_key_counts(device, dtype, queries, keys):
    heads = 1 if queries == 1000 else 2
    check(draw([queries], keys, heads=heads, dtype=dtype, device=device, mask="holes"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 7, 32, 40, 64, 80, 88, 96, 104, 128, 256])
def test_head_widths(device, dtype, dim):
    check(draw([30, 17], 197, dim=dim, dtype=dtype, device=device))
    check(draw([30, 17], [45, 33], dim=dim, dtype=dtype, device=device, mask="holes"), causal=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
def test_causal_rows_and_dropout_beyond_one_block(device, dtype, mask):
    case = draw([140, 300], [170, 310], dtype=dtype, device=device, mask=mask)
    check(case, causal=True, dropout_p=0.1, dropout_seed=5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [40, 64])
@pytest.mark.parametrize("scale", [0.2, -0.2])
def test_a_few_keys_beyond_whole_blocks(device, dtype, dim, scale):
    # 33, 136 and 257 keys: 1, 8 and 1 more than blocks of 32 hold. Up to 64 query rows and more.
    case = draw([160, 140, 170], [33, 136, 257], dim=dim, dtype=dtype, device=device)
    check(case, scale=scale)
    check(case, scale=scale, causal=True, dropout_p=0.1, dropout_seed=5)
    check(draw([60, 35], 257, dim=dim, dtype=dtype, device=device), scale=scale, causal=True)
    case = draw([60], 257, dim=dim, dtype=dtype, device=device, mask="holes")
    check(case, dropout_p=0.2, dropout_seed=5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rise", [0.5, 4.0, 40.0])
def test_logits_that_rise_along_the_keys(device, dtype, rise):
    # By `rise` a key: exponentials relative to the largest logit of some keys would overflow.
    case = draw([30, 5, 70], 165, dtype=dtype, device=device, norms=(0.2, 0.2, 1.0))
    heights = torch.arange(165, device=device) % 150 * rise
    q, k = case.q.clone(), case.k.clone()
    q[..., 0] = 8.0
    k[..., 0] = heights[:, None].to(dtype)
    case = replace(case, q=q, k=k)
    check(case)
    check(case, causal=True, dropout_p=0.1, dropout_seed=3)


@pytest.mark.parametrize("dim", [257, 320])
def test_wider_heads_than_the_kernels_hold(device, dim):
    check(draw([9, 4], 33, dim=dim, device=device))


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_images_and_heads(device, dtype):
    lengths = [30, 0, 7, 128, 1, 61, 30, 12, 90]
    check(draw(lengths, 65, heads=12, dim=32, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("keys", [45, [45, 3, 61], 200])
def test_layouts_are_read_in_place_or_copied_but_not_misread(device, dtype, layout, keys):
    case = draw([30, 2, 9], keys, dtype=dtype, device=device, layout=layout)
    plain = draw([30, 2, 9], keys, dtype=dtype, device=device)
    ours = check(case)
    for name in NAMES:
        assert torch.equal(getattr(ours, name), getattr(run(cross_attention, plain), name)), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", [45, [45, 3, 61], 600])
def test_gradients_on_the_cpu_lie_as_dense_inputs_do(dtype, keys):
    for layout in LAYOUTS:
        case = draw([30, 2, 9], keys, dtype=dtype, layout=layout)
        ours = run(cross_attention, case)
        for name in ("q", "k", "v"):
            gradient, tensor = getattr(ours, name), getattr(case, name)
            dense = layout in ("contiguous", "heads first")
            wanted = tensor if dense else tensor.contiguous()
            assert gradient.stride() == wanted.stride(), (layout, name)


def test_keys_shared_by_all_images(device):
    # One image's tokens expanded, without a copy, for several groups of captions.
    case = draw([5, 30, 11], 40, device=device)
    shared = vars(case) | {
        "k": case.k[:1].expand(3, -1, -1, -1),
        "v": case.v[1:2].expand_as(case.k),
    }
    check(type(case)(**shared))


def test_gradients_flow_through_views_of_one_projection(device):
    tokens = torch.randn(2, 37, 3, 2, 16, device=device, requires_grad=True)
    packed = tokens.flatten(0, 1)
    cu = torch.tensor([0, 37, 74], dtype=torch.int32, device=device)
    out = cross_attention(*packed.unbind(1), cu, cu)
    (ours,) = torch.autograd.grad(out.square().sum(), tokens)
    leaves = [t.detach().requires_grad_() for t in packed.unbind(1)]
    out = cross_attention(*leaves, cu, cu)
    apart = torch.autograd.grad(out.square().sum(), leaves)
    assert torch.equal(ours.flatten(0, 1), torch.stack(apart, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "q_lengths, keys",
    [
        ([], 5),
        ([], []),
        ([0, 0], 5),
        ([0, 4, 0], 5),
        ([3, 4], 0),
        ([3, 0, 4], [0, 5, 0]),
        ([0, 0], [0, 0]),
        ([1], 1),
        ([1], [1]),
    ],
)
@pytest.mark.parametrize("causal", [False, True])
def test_empty_segments(device, dtype, q_lengths, keys, causal):
    case = draw(q_lengths, keys, dtype=dtype, device=device)
    ours = check(case, causal=causal)
    rows = case.cu_q.tolist()
    for i, length in enumerate(q_lengths):
        count = keys if isinstance(keys, int) else keys[i]
        if length and not count:  # nothing to attend to
            assert not ours.out[rows[i] : rows[i + 1]].any()
            assert not ours.q[rows[i] : rows[i + 1]].any()
        if not isinstance(keys, int) or length:
            continue
        assert not ours.k[i].any() and not ours.v[i].any()


@pytest.mark.parametrize("shape", [(0, 64), (2, 0)])
def test_no_heads_or_no_width_is_refused(device, shape):
    q = torch.zeros(4, *shape, device=device)
    k = torch.zeros(1, 3, *shape, device=device)
    cu = torch.tensor([0, 4], device=device)
    with pytest.raises(ValueError, match=r"\bq\b"):
        cross_attention(q, k, k, cu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits(device, dtype):
    # Logits of +-1e4: one-hot rows, and a softmax without its maximum would overflow.
    case = draw([33, 5], 150, dtype=dtype, device=device, norms=(100.0, 100.0, 1.0))
    logits = torch.einsum("qhd,khd->hqk", case.q[:33].double(), case.k[0].double()) / 8
    assert logits.max() > 3e3 and logits.min() < -3e3
    check(case)
    check(draw([33, 5], [150, 20], dtype=dtype, device=device, norms=(1e2, 1e2, 1.0)), causal=True)


@pytest.mark.parametrize("value", [1e4, -1e4])
def test_equal_extreme_logits(device, value):
    case = draw([20], 70, dim=16, device=device)
    case.q.fill_(1.0)
    case.k.fill_(value / 16)
    check(case, scale=1.0)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype, size, dim", [
    (torch.float32, 1e10, 64), (torch.float32, 1e30, 24), (torch.bfloat16, 1e10, 64),
    (torch.bfloat16, 1e12, 24), (torch.float16, 1e9, 64),
])  # fmt: skip
@pytest.mark.parametrize("options", [{"scale": 1.0}, {"scale": -1.0, "causal": True}])
def test_logits_that_floats_hold_coarsely(monkeypatch, isa, dtype, size, dim, options):
    monkeypatch.setenv("FASTVLP_CPU_ISA", isa)
    norm = (size / dim**0.5) ** 0.5
    case = draw([70, 3], 90, dim=dim, dtype=dtype, mask="holes", norms=(norm, norm, 1e-2))
    case.k[:, 45:] = case.k[:, :45]  # a row's largest logit comes twice, or once where masked
    ours, eager = (run(f, case, **options) for f in (cross_attention, cross_attention_reference))
    exact = run(cross_attention_reference, case, torch.float64, **options)
    largest = {name: getattr(case, name).double().norm(dim=-1).max() for name in "qkv"}
    # Gradients of logits are differences of terms of this size.
    terms = epsilon(dtype) * case.upstream.double().norm() * largest["v"]
    floors = {"q": terms * largest["k"], "k": terms * largest["q"]}
    for name in NAMES:
        true = getattr(exact, name)
        floor = epsilon(dtype) * true.norm() + floors.get(name, 0.0)
        assert_as_accurate(name, getattr(ours, name), getattr(eager, name), true, floor.item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norms", [(1e-20, 1.0, 1.0), (1.0, 1e-20, 1.0), (1.0, 1.0, 1e-20)])
def test_tiny_values(device, dtype, norms):
    check(draw([30, 4], 77, dtype=dtype, device=device, norms=norms))


@pytest.mark.parametrize("scale", [0.0, -0.5, 1e-3])
def test_any_finite_scale(device, scale):
    check(draw([30, 4], 77, device=device, mask="holes"), scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_key_of_minus_infinity_counts_nothing(device, dtype):
    case = draw([70, 4], 97, dtype=dtype, device=device)
    case.q[:, :, 0] = 1.0
    hidden = torch.ones(2, 97, dtype=torch.bool, device=device)
    hidden[:, 5] = False
    expected = cross_attention(*case.arguments()[0], key_mask=hidden)
    case.k[:, 5, :, 0] = float("-inf")
    out = cross_attention(*case.arguments()[0])
    rtol = 1e-3 if dtype == torch.float16 else 1e-5
    torch.testing.assert_close(out, expected, rtol=rtol, atol=1e-6)


# Beyond 2^120 and below 2^-110 parts of floats would overflow or vanish.
@pytest.mark.parametrize("norms", [(1.0, 1.0, 1e36), (1.0, 1.0, 1e-34), (1e-34, 1e30, 1.0)])
def test_floats_near_the_ends_of_their_range(device, norms):
    check(draw([70, 4], 97, device=device, norms=norms))


def test_nan_of_a_query_stays_in_its_row(device):
    for value in (float("nan"), float("inf")):
        case = draw([70, 4], 97, device=device)
        clean = run(cross_attention, case)
        case.q[3, 0, 5] = value
        out = cross_attention(*case.arguments()[0])
        assert out[3, 0].isnan().all()
        out[3, 0] = clean.out[3, 0]
        assert torch.equal(out, clean.out)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(monkeypatch, dtype, isa):
    monkeypatch.setenv("FASTVLP_CPU_ISA", isa)
    check(draw([30, 0, 129], 197, dtype=dtype, mask="holes"))
    check(draw([3, 17], [3, 17], dim=88, dtype=dtype), causal=True)
    check(draw([31], 577, dim=7, dtype=dtype, layout="wide rows"), dropout_p=0.1, dropout_seed=3)
    check(draw([1], 1, dim=1, dtype=dtype))


def test_unknown_instruction_set(monkeypatch):
    monkeypatch.setenv("FASTVLP_CPU_ISA", "mmx")
    with pytest.raises(RuntimeError, match="FASTVLP_CPU_ISA.*mmx"):
        run(cross_attention, draw([4], 8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", [300, [300, 41, 7]])
def test_bitwise_deterministic(device, dtype, keys):
    case = draw([140, 30, 7], keys, heads=3, dtype=dtype, device=device, mask="holes")
    first = run(cross_attention, case, dropout_p=0.1, dropout_seed=5)
    second = run(cross_attention, case, dropout_p=0.1, dropout_seed=5)
    for name in NAMES:
        assert torch.equal(getattr(first, name), getattr(second, name)), name


def test_longest_lengths_are_only_a_hint(device):
    case = draw([20, 33], [70, 12], device=device)
    found = check(case)
    told = check(case, max_seqlen_q=33, max_seqlen_k=70)
    check(case, max_seqlen_q=500, max_seqlen_k=500)
    for name in NAMES:
        assert torch.equal(getattr(found, name), getattr(told, name))


def test_more_rows_than_keys_and_the_reverse_in_one_call(device):
    check(draw([257, 1, 3], [2, 300, 3], device=device), causal=True)


def test_the_reference_is_the_padded_attention_of_torch(device):
    case = draw([13] * 3, 29, dtype=torch.float64, device=device, mask="holes")
    case.key_mask[:, 0] = True
    q = case.q.unflatten(0, (3, 13)).transpose(1, 2)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, case.k.transpose(1, 2), case.v.transpose(1, 2), attn_mask=case.key_mask[:, None, None]
    )
    found = cross_attention_reference(case.q, case.k, case.v, case.cu_q, key_mask=case.key_mask)
    torch.testing.assert_close(found, expected.transpose(1, 2).flatten(0, 1))


@pytest.mark.parametrize("causal", [False, True])
def test_float64_runs_the_reference_and_passes_gradcheck(device, causal):
    case = draw([3, 0, 2], [4, 2, 2], dim=3, dtype=torch.float64, device=device, mask="holes")
    leaves = [t.requires_grad_() for t in (case.q, case.k, case.v)]

    def call(*tensors):
        return cross_attention(
            *tensors, case.cu_q, case.cu_k, key_mask=case.key_mask, causal=causal
        )

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 1e-42, 1e-30, -1.0])
def test_unusual_scales(monkeypatch, isa, dtype, scale):
    monkeypatch.setenv("FASTVLP_CPU_ISA", isa)
    for mask in (None, "holes"):
        case = draw([17, 3], 40, dim=64, dtype=dtype, mask=mask)
        check(case, causal=True, scale=scale)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_0_is_that_of_sdpa(monkeypatch, isa, dtype):
    # The mean of the values; q and k have no gradient, though dS is not 0.
    monkeypatch.setenv("FASTVLP_CPU_ISA", isa)
    case = draw([5, 5], 7, dim=16, dtype=dtype)

    def heads_first(t):
        return t.double().view(2, -1, 2, 16).transpose(1, 2)

    q, k, v = (t.clone().requires_grad_() for t in (case.q, case.k, case.v))
    wide = [heads_first(t.detach()).requires_grad_() for t in (q, k, v)]
    sdpa = torch.nn.functional.scaled_dot_product_attention
    expected = sdpa(*wide, scale=0.0)
    expected.backward(heads_first(case.upstream))
    out = cross_attention(q, k, v, case.cu_q, scale=0.0)
    out.backward(case.upstream)
    bound = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(heads_first(out), expected, rtol=bound, atol=bound)
    assert not q.grad.any() and not k.grad.any()
    assert not wide[0].grad.any() and not wide[1].grad.any()
    wanted = wide[2].grad
    error = (heads_first(v.grad) - wanted).norm()
    assert error <= bound * wanted.norm()
