"""cross_attention of a few query rows and of short segments, and where derivatives are not asked
for: paths of their own, for calls that take microseconds."""

import pytest
import torch
from fastvlp_tests.attention_cases import LAYOUTS, NAMES, Case, check, cumulative, draw, run
from torch.autograd import forward_ad

from fastvlp.ops import cross_attention

INSTRUCTION_SETS = torch.ops.fastvlp.cpu_instruction_sets().split(",")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_few_query_rows(monkeypatch, dtype, isa):
    monkeypatch.setenv("FASTVLP_CPU_ISA", isa)
    check(draw([1, 3, 4, 0, 5], 77, dtype=dtype, mask="holes"))
    check(draw([1, 4], 577, dtype=dtype, layout="heads first"), scale=-0.2)
    check(draw([2, 1], 130, dtype=dtype), dropout_p=0.2, dropout_seed=3)
    # The first rows of the second segment attend no key.
    packed = draw([3, 4, 2, 1], [3, 2, 50, 1], dtype=dtype, layout="fused", mask="prefix")
    check(packed, causal=True)
    check(draw([4, 3], [16, 17], dtype=dtype), causal=True)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("dim", [16, 64])
def test_short_segments(monkeypatch, dim, isa):
    monkeypatch.setenv("FASTVLP_CPU_ISA", isa)
    lengths = [30, 7, 0, 64, 16, 33]
    check(draw(lengths, lengths, dim=dim, layout="fused"))
    check(draw(lengths, lengths, dim=dim), causal=True, scale=-0.3)
    check(draw([40, 5, 64], [3, 64, 41], dim=dim, layout="heads first"), causal=True)
    check(draw([30, 9], 61, dim=dim), dropout_p=0.1, dropout_seed=3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_small_tasks_read_no_memory_of_others(dtype, layout):
    """Of rows that end with their tensor, and lie between values that are NaN."""
    for lengths in ([30, 13], [3, 1]):
        ours = check(draw(lengths, lengths, dtype=dtype, layout=layout))
        plain = run(cross_attention, draw(lengths, lengths, dtype=dtype))
        for name in NAMES:
            assert torch.equal(getattr(ours, name), getattr(plain, name)), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(dtype, value):
    for lengths in ([4, 30], [30, 4]):
        case = draw(lengths, lengths, dtype=dtype)
        clean = run(cross_attention, case)
        case.q[1, 0, 5] = value
        out = cross_attention(*case.arguments()[0])
        assert out[1, 0].isnan().all()
        out[1, 0] = clean.out[1, 0]
        assert torch.equal(out, clean.out)


def part_of(case: Case, first: int, end: int) -> Case:
    return Case(
        case.q[first:end], case.k[first:end], case.v[first:end], cumulative([end - first]),
        cumulative([end - first]), None, case.upstream[first:end],
    )  # fmt: skip


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_beyond_the_caches_are_those_of_smaller_calls(monkeypatch, dtype, isa):
    """They are written past the caches, and by segments of every kind."""
    monkeypatch.setenv("FASTVLP_CPU_ISA", isa)
    lengths = [3, 30, 64, 130] * 7
    case = draw(lengths, lengths, heads=24, dtype=dtype)
    assert case.q.numel() * case.q.element_size() > 1 << 20
    whole = run(cross_attention, case)
    starts = case.cu_q.tolist()
    for first, end in zip(starts[:-1], starts[1:], strict=True):
        part = run(cross_attention, part_of(case, first, end))
        for name in NAMES:
            assert torch.equal(getattr(whole, name)[first:end], getattr(part, name)), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_derivatives_the_output_is_the_same(dtype):
    case = draw([30, 4], 45, dtype=dtype, mask="holes")
    leaves, options = case.arguments()
    plain = cross_attention(*leaves, **options)
    leaves = [t.clone().requires_grad_() for t in leaves[:3]] + list(leaves[3:])
    out = cross_attention(*leaves, **options)
    assert out.requires_grad and not plain.requires_grad and torch.equal(out, plain)
    with torch.no_grad():
        without = cross_attention(*leaves, **options)
    assert not without.requires_grad and torch.equal(without, plain)
    values = cross_attention(*leaves[:2], leaves[2].detach(), *leaves[3:], **options)
    assert values.requires_grad


def test_tangents_are_not_dropped():
    """There is no derivative in that direction; to go on without it would be wrong."""
    case = draw([3], 5)
    with forward_ad.dual_level():
        q = forward_ad.make_dual(case.q, torch.ones_like(case.q))
        with pytest.raises((RuntimeError, NotImplementedError), match="jvp|forward"):
            cross_attention(q, case.k, case.v, case.cu_q)
