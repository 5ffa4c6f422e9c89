"""The float64 path of `ema` and `adamw_ema` on shared memory: as the kernels, or refused whole."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlp.ops import adamw_ema, ema
from fastvlp.ops.ema.memory import share_bytes


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
    if results[0][0] is None:
        for wide, narrow in zip(results[0][1:], results[1][1:], strict=True):
            torch.testing.assert_close(wide.float(), narrow)


def addresses(view):
    """Of every byte of a view."""
    places = torch.full((1,), view.data_ptr())
    for size, stride in zip(view.shape, view.stride(), strict=True):
        places = places[..., None] + torch.arange(size) * stride * view.element_size()
    return {place + i for place in places.flatten().tolist() for i in range(view.element_size())}


@st.composite
def strided(draw):
    """A view of at most three dimensions and any strides, zero and overlapping ones included."""
    dims = draw(st.integers(0, 3))
    shape = draw(st.lists(st.integers(1, 4), min_size=dims, max_size=dims))
    strides = draw(st.lists(st.integers(0, 13), min_size=dims, max_size=dims))
    return shape, strides, draw(st.integers(0, 40)), draw(st.sampled_from(DTYPES))


DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@given(strided(), strided())
@settings(max_examples=300)
def test_sharing_is_found_exactly(one, other):
    memory = torch.zeros(1000, dtype=torch.uint8)
    a, b = (
        memory.view(dtype).as_strided(shape, strides, offset)
        for shape, strides, offset, dtype in (one, other)
    )
    assert share_bytes(a, b) == share_bytes(b, a) == bool(addresses(a) & addresses(b))


BLOCK = [
    (lambda x: (x[:, 0::2], x[:, 1::2]), False),  # interleaved columns
    (lambda x: (x[0::2], x[1::2]), False),
    (lambda x: (x[:, :3], x[:, 3:6]), False),  # slabs
    (lambda x: (x[:, :4], x[:, 3:7]), True),
    (lambda x: (x[:, 0::2], x[:, 0:8:2]), True),  # of one first address
    (lambda x: (x[::2, ::3], x[1::2, 1::3]), False),
    (lambda x: (x[::2, ::3], x[::3, 1::3]), False),
    (lambda x: (x[::2, 2:6:3], x[::3, :4:2]), True),
    (lambda x: (x.T[1:3], x[:8, 3:5].T), False),
    (lambda x: (x.T[1:4], x[:8, 3:6].T), True),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", range(len(BLOCK)))
def test_views_with_gaps_are_refused_where_they_share_an_element(case, dtype):
    views_of, shared = BLOCK[case]
    x = torch.zeros(8, 8, dtype=dtype)
    momenta = views_of(x)
    sources = [torch.full_like(m, i + 1.0) for i, m in enumerate(momenta)]
    if shared:
        with pytest.raises(RuntimeError, match=r"(overlaps|shares memory with) momentum\[[01]\]"):
            ema(momenta, sources, 0.5)
        assert not x.any()
    else:
        ema(momenta, sources, 0.5)
        for m, s in zip(momenta, sources, strict=True):
            assert torch.equal(m, s / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_view_with_gaps_may_be_its_own_source_and_no_other(dtype):
    x = torch.arange(24.0, dtype=dtype).view(4, 6)
    before = x.clone()
    ema([x[:, ::2]], [x[:, ::2]], 0.5)
    assert torch.equal(x, before)
    for source in (x[:, 1:].as_strided((4, 3), (6, 1), 1), x[:3, ::2].T.as_strided((4, 3), (2, 6))):
        with pytest.raises(RuntimeError, match=r"overlaps (momentum|source)\[0\], and one"):
            ema([x[:, ::2]], [source], 0.5)
    assert torch.equal(x, before)


def test_interleaved_views_of_large_memory_are_told_apart():
    # A look at each pair of elements would never end.
    x = torch.zeros(4000, 4096)
    columns = [x[:, i::16] for i in range(16)]
    ema(columns, columns, 0.5)
    assert not any(share_bytes(columns[0], c) for c in columns[1:])
    assert share_bytes(columns[3], x[3999, 4083:])


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
