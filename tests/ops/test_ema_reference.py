"""The float64 path of `ema` and `adamw_ema` on shared memory: as the kernels, or refused whole."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlp.ops import adamw_ema, ema


def views(dtype, layout):
    """Tensors of one piece of memory, each by its (start, length, step)."""
    memory = torch.arange(1.0, 41.0, dtype=dtype)
    return memory, [memory[a : a + n * s : s] for a, n, s in layout]


def outcome(dtype, momentum, copies, sources):
    """The memories after an update, or what was refused and the memories as they were."""
    m, momenta = views(dtype, momentum)
    c, targets = views(dtype, copies)
    kinds = [torch.full((4,), 100.0 * mark, dtype=dtype) for mark in (0, 1)]
    s = [kinds[mark] for mark in sources]
    before = m.clone(), c.clone()
    try:
        ema(momenta, s, 0.5, targets)
    except RuntimeError as error:
        assert torch.equal(m, before[0]) and torch.equal(c, before[1])
        return str(error).splitlines()[0].partition(":")[0], m, c
    return None, m, c


def depends_on_order(momentum, copies, sources):
    """Whether rows that differ write one element. Views with gaps are not compared, so such rows
    pass, and what is left there is of the row that happened to be last."""
    rows = set(zip(momentum, copies, sources, strict=True))
    written = [
        (which, a + i * step) for row in rows for which in (0, 1) for a, n, step in [row[which]]
        for i in range(n)
    ]  # fmt: skip
    return len(set(written)) < len(written)


PLACES = st.sampled_from([(0, 4, 1), (2, 4, 1), (4, 4, 1), (8, 4, 1), (20, 4, 2), (12, 4, 1)])


@given(
    momentum=st.lists(PLACES, min_size=1, max_size=4),
    copies=st.lists(PLACES, min_size=4, max_size=4),
    sources=st.lists(st.integers(0, 1), min_size=4, max_size=4),
)
@settings(max_examples=80, deadline=None)
def test_shared_memory_is_treated_as_by_the_kernel(momentum, copies, sources):
    count = len(momentum)
    results = [
        outcome(dtype, momentum, copies[:count], sources[:count])
        for dtype in (torch.float64, torch.float32)
    ]
    assert (results[0][0] is None) == (results[1][0] is None)
    rows = momentum, copies[:count], sources[:count]
    if results[0][0] is None and not depends_on_order(*rows):
        for wide, narrow in zip(results[0][1:], results[1][1:], strict=True):
            torch.testing.assert_close(wide.float(), narrow)


def test_tied_tensors_are_averaged_once():
    m, s = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    ema([m, m], [s, s], 0.5)
    assert (m == 0.5).all()
    ema([m], [m], 0.5)  # its own source
    assert (m == 0.5).all()


def test_overlaps_are_refused_before_anything_is_written():
    memory, s = torch.zeros(100, dtype=torch.float64), torch.ones(50, dtype=torch.float64)
    apart = torch.zeros(50, dtype=torch.float64)
    for call, message in (
        (lambda: ema([apart, memory[:50], memory[40:90]], [s, s, s], 0.5),
         r"momentum\[2\]: overlaps momentum\[1\]"),
        (lambda: ema([memory[:50]], [memory[25:75]], 0.5), r"source\[0\]: overlaps momentum\[0\]"),
        (lambda: ema([apart, memory[:50]], [s, s], 0.5, [memory[:50], memory[50:]]),
         r"overlaps"),
        (lambda: ema([apart, memory[:50], memory[:50]], [s, s, s + 1], 0.5),
         r"momentum\[2\]: shares memory with momentum\[1\]"),
        (lambda: ema([apart, memory[:1].expand(50)], [s, s], 0.5),
         r"momentum\[1\]: expected every element at an address of its own"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            call()
        assert not memory.any() and not apart.any()


def test_adamw_updates_tied_tensors_once_and_refuses_overlaps():
    def lists():
        return [torch.ones(4, dtype=torch.float64) for _ in range(5)]

    options = {"step": 1, "lr": 0.1, "decay": 0.5}
    once, twice = lists(), lists()
    adamw_ema(*([t] for t in once), **options)
    adamw_ema(*([t, t] for t in twice), **options)
    assert all(map(torch.equal, once, twice)) and not torch.equal(once[0], torch.ones(4))
    w, g, m, v, e = lists()
    other = torch.ones(6, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"overlaps"):
        adamw_ema([w, other[:4]], [g, g], [m, other[2:]], [v, v.clone()], [e, e.clone()], **options)
    assert all((t == 1).all() for t in (w, other, m, v, e))
