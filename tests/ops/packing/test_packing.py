"""Packed text and pairs grouped by image against indexing one token at a time."""

import pytest
import torch
from fastvlp_tests.tolerance import assert_as_accurate, epsilon
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlp.ops.packing import PairLayout, TextLayout

lengths_strategy = st.lists(st.integers(0, 6), min_size=0, max_size=6)


def padded_tokens(layout_mask, width=3, dtype=torch.float64):
    torch.manual_seed(0)
    return torch.randn(*layout_mask.shape, width, dtype=dtype)


def prefix_mask(lengths, length=6):
    return torch.arange(length) < torch.tensor(lengths, dtype=torch.int64).reshape(-1, 1)


def texts_of(padded, mask):
    """The tokens of each text as a list."""
    return [row[keep] for row, keep in zip(padded, mask, strict=True)]


def joined(parts, like):
    return torch.cat(list(parts)) if len(parts) else like.new_zeros(0, *like.shape[2:])


@given(lengths=lengths_strategy)
def test_pack_is_boolean_indexing_and_unpack_its_inverse(device, lengths):
    mask = prefix_mask(lengths).to(device)
    x = padded_tokens(mask).to(device)
    layout = TextLayout.from_lengths(lengths, 6, device)
    assert layout.lengths == tuple(lengths) and layout.total == sum(lengths)
    assert layout.max_seqlen == max(lengths, default=0)
    assert layout.cu_seqlens.dtype == torch.int32
    assert layout.cu_seqlens.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    packed = layout.pack(x)
    assert torch.equal(packed, x[mask])
    assert torch.equal(layout.unpack(packed), torch.where(mask[..., None], x, 0))


@given(mask=st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=5))
def test_a_mask_with_holes(device, mask):
    mask = torch.tensor(mask, device=device)
    x = padded_tokens(mask).to(device)
    layout = TextLayout.from_mask(mask)
    assert torch.equal(layout.pack(x), x[mask])
    assert torch.equal(layout.unpack(x[mask]), torch.where(mask[..., None], x, 0))
    assert torch.equal(TextLayout.from_mask(mask.long()).pack(x), x[mask])
    zero = torch.zeros_like(x[0, 0])
    texts = texts_of(x, mask)
    first = torch.stack([t[0] if len(t) else zero for t in texts])
    last = torch.stack([t[-1] if len(t) else zero for t in texts])
    assert torch.equal(layout.first(x[mask]), first)
    assert torch.equal(layout.last(x[mask]), last)


def test_whole_numbers_pack_too(device):
    """Token ids and labels."""
    ids = torch.arange(8, device=device).reshape(2, 4)
    layout = TextLayout.from_lengths(torch.tensor([3, 1]), 4, device)
    assert layout.pack(ids).tolist() == [0, 1, 2, 4]
    assert layout.unpack(layout.pack(ids)).tolist() == [[0, 1, 2, 0], [4, 0, 0, 0]]


def test_nan_in_padding_stays_there(device):
    x = torch.full((2, 3, 2), torch.nan, device=device)
    x[0, :2] = 1.0
    x.requires_grad_()
    layout = TextLayout.from_lengths([2, 0], 3, device)
    padded = layout.unpack(layout.pack(x))
    padded.sum().backward()
    assert padded.isfinite().all()
    assert torch.equal(x.grad, layout.unpack(torch.ones(2, 2, device=device)))


@st.composite
def paired(draw):
    lengths = draw(st.lists(st.integers(0, 5), min_size=1, max_size=5))
    images = draw(st.integers(1, 5))
    pair = st.tuples(st.integers(0, len(lengths) - 1), st.integers(0, images - 1))
    return lengths, images, draw(st.lists(pair, max_size=10))


def grouped_by_hand(tokens, lengths, pairs, images):
    """For each image its pairs' tokens: [image][pair number] -> tokens."""
    texts = tokens.split(lengths)
    return [
        {p: texts[t] for p, (t, i) in enumerate(pairs) if i == image} for image in range(images)
    ]


@given(case=paired())
def test_pairs_are_grouped_by_image(device, case):
    lengths, images, pairs = case
    texts = TextLayout.from_lengths(lengths, 6, device)
    tokens = torch.randn(texts.total, 2, dtype=torch.float64, device=device)
    layout = PairLayout.make(texts, [t for t, _ in pairs], [i for _, i in pairs], images)
    wanted = grouped_by_hand(tokens, lengths, pairs, images)
    blocks = [block for of_image in wanted for block in of_image.values()]
    grouped = layout.expand(tokens)

    assert torch.equal(grouped, joined(blocks, tokens[None]))
    assert layout.total == len(grouped)
    cu_pairs, cu_images = layout.cu_seqlens_pairs, layout.cu_seqlens_images
    assert cu_pairs.dtype == cu_images.dtype == torch.int32
    assert [0, *cu_pairs.diff().tolist()][1:] == [len(block) for block in blocks]
    rows = [sum(map(len, of_image.values())) for of_image in wanted]
    assert cu_images.diff().tolist() == rows
    assert layout.max_seqlen_images == max(rows)
    assert layout.max_seqlen_pairs == max(map(len, blocks), default=0)
    assert cu_pairs[0] == cu_images[0] == 0

    by_pair = {p: block for of_image in wanted for p, block in of_image.items()}
    zero = tokens.new_zeros(2)
    first = [by_pair[p][0] if len(by_pair[p]) else zero for p in range(len(pairs))]
    assert torch.equal(layout.first(grouped), torch.stack(first) if pairs else tokens[:0])
    backwards = list(range(len(pairs)))[::-2]
    selected = layout.select(backwards)(grouped)
    assert torch.equal(selected, joined([by_pair[p] for p in backwards], tokens[None]))


@settings(max_examples=20)
@given(case=paired())
def test_gradients(case):
    """First and second derivatives of every map, in float64 by finite differences."""
    lengths, images, pairs = case
    texts = TextLayout.from_lengths(lengths, 5)
    layout = PairLayout.make(texts, [t for t, _ in pairs], [i for _, i in pairs], images)
    padded = torch.randn(len(lengths), 5, 1, dtype=torch.float64, requires_grad=True)
    some = range(0, len(pairs), 2)

    def function(x):
        grouped = layout.expand(texts.pack(x))
        parts = layout.first(grouped), layout.select(some)(grouped), texts.last(texts.pack(x))
        return torch.cat(parts).sin() if layout.total else texts.unpack(texts.pack(x))

    assert torch.autograd.gradcheck(function, padded)
    assert torch.autograd.gradgradcheck(function, padded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_over_pairs_are_accurate_and_repeatable(device, dtype):
    """A text in 300 pairs: its gradient is a sum of 300 rows."""
    texts = TextLayout.from_lengths([2, 3, 4], 4, device)
    torch.manual_seed(0)
    image_index = torch.randint(0, 7, (305,))
    text_index = torch.tensor([0] * 300 + [1] * 5)[torch.randperm(305)]
    layout = PairLayout.make(texts, text_index, image_index, 7)
    upstream = torch.randn(layout.total, 64, device=device).to(dtype)

    def gradient(expand, dtype):
        tokens = torch.zeros(texts.total, 64, dtype=dtype, device=device, requires_grad=True)
        expand(tokens).backward(upstream.to(dtype))
        return tokens.grad

    ours = gradient(layout.expand, dtype)
    assert ours.dtype == dtype
    assert (ours[-4:] == 0).all()  # no pair has the last text
    assert torch.equal(ours, gradient(layout.expand, dtype))
    eager = gradient(lambda x: x[layout.expand.source], dtype)
    exact = gradient(lambda x: x[layout.expand.source], torch.float64)
    assert_as_accurate("tokens", ours, eager, exact, floor=epsilon(dtype) * exact.norm().item())


def test_nothing_is_read_back_from_the_device():
    """A meta tensor has no values: whoever reads one fails."""
    texts = TextLayout.from_lengths([2, 0, 3], 4, "meta")
    layout = PairLayout.make(texts, [2, 0, 1, 2], [0, 1, 1, 2], 3)
    x = torch.empty(3, 4, 2, device="meta", requires_grad=True)
    grouped = layout.expand(texts.pack(x))
    chosen = layout.select([0, 3])(grouped)
    assert grouped.shape == (8, 2) and chosen.shape == (6, 2)
    assert layout.first(grouped).shape == (4, 2)
    texts.unpack(texts.pack(x)).sum().backward()
    assert x.grad.shape == x.shape and x.grad.device.type == "meta"


def test_compiles_without_a_break(device):
    texts = TextLayout.from_lengths([2, 0, 3], 4, device)
    layout = PairLayout.make(texts, [2, 0, 1, 2], [0, 1, 1, 2], 3)
    take = layout.select([3, 0])

    def function(x):
        packed = texts.pack(x)
        grouped = layout.expand(packed)
        return layout.first(grouped), take(grouped), texts.unpack(packed.sin())

    results = []
    for f in (function, torch.compile(function, fullgraph=True)):
        x = torch.linspace(0, 1, 24, device=device).reshape(3, 4, 2).requires_grad_()
        parts = f(x)
        torch.cat([p.flatten() for p in parts]).square().sum().backward()
        results.append([*parts, x.grad])
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(plain, compiled)


TEXTS = TextLayout.from_lengths([2, 1], 3)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: TextLayout.from_lengths([4], 3), "lengths.*padded_length, 3.*4"),
        (lambda: TextLayout.from_lengths([-1], 3), "lengths.*0 to.*-1"),
        (lambda: TextLayout.from_lengths([1.5], 3), "lengths.*whole.*float"),
        (lambda: TextLayout.from_mask(torch.ones(3)), r"mask.*\[texts, length\].*\(3,\)"),
        (lambda: TEXTS.pack(torch.ones(2, 4, 1)), r"padded.*\[2, 3, ...\].*\(2, 4, 1\)"),
        (lambda: TEXTS.unpack(torch.ones(4, 1)), r"rows.*expected 3.*\(4, 1\)"),
        (lambda: PairLayout.make(TEXTS, [2], [0], 1), "text_index.*0 to 1.*2 texts.*2"),
        (lambda: PairLayout.make(TEXTS, [0], [-1], 1), "image_index.*0 to 0.*1 images.*-1"),
        (lambda: PairLayout.make(TEXTS, [0, 1], [0], 1), "image_index.*2 of text_index.*1"),
        (lambda: PairLayout.make(TEXTS, [0], [0], 1).select([1]), "pairs.*0 to 0.*1 pairs.*1"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
