"""A fusion layer that computes some rows gives those of the whole layer, and their gradients."""

import pytest
import torch
from fastvlp_tests.fusion_cases import PAIRS, case, layers, layout

# Of the 29 rows: some in no order, two of them in one pair; one; none; all.
ROWS = [[6, 2, 25, 11], [0], [], list(range(28, -1, -1))]


def run(layer, rows, upstream, c, whole, key_mask=None):
    """Output rows and gradients, computed alone or taken from the whole layer's."""
    texts, pairs = layout()
    layer.zero_grad()
    tokens = pairs.expand(texts.pack(c.text)).requires_grad_()
    images = c.images.clone().requires_grad_()
    keep = None if whole else pairs.keep(rows)
    out = layer(
        tokens, pairs.cu_seqlens_pairs, images, pairs.cu_seqlens_images, key_mask=key_mask,
        keep=keep, max_seqlen_pairs=pairs.max_seqlen_pairs,
        max_seqlen_images=pairs.max_seqlen_images,
    )  # fmt: skip
    out = out[rows] if whole else keep.restore(out)
    (out * upstream[: len(rows)]).sum().backward()
    found = {"out": out.detach(), "tokens": tokens.grad, "images": images.grad}
    return found | {name: p.grad for name, p in layer.named_parameters()}


@pytest.mark.parametrize("rows", ROWS, ids=["some", "one", "none", "all backwards"])
@pytest.mark.parametrize("masked", [False, True])
def test_kept_rows_and_their_gradients(rows, masked):
    c = case(masked=masked)
    layer, _ = layers(32, 4, image_width=24, dropout=0.0, attention_dropout=0.0)
    _, pairs = layout()
    rows = torch.tensor(rows, dtype=torch.int64)
    upstream = torch.randn(pairs.total, 32, dtype=torch.float64)
    alone, whole = (run(layer, rows, upstream, c, w, c.key_mask) for w in (False, True))
    for name, wanted in whole.items():
        torch.testing.assert_close(alone[name], wanted, rtol=1e-9, atol=1e-12, msg=name)


def test_rows_of_pairs_are_where_select_takes_them():
    _, pairs = layout()
    numbers = [4, 0, len(PAIRS) - 1]
    x = torch.arange(pairs.total)
    assert torch.equal(pairs.select(numbers)(x), x[pairs.rows(numbers)])
    assert torch.equal(pairs.first(x)[numbers], x[pairs.starts[numbers]])


def test_causal_rows_are_refused():
    c = case()
    layer, _ = layers(32, 4, image_width=24)
    texts, pairs = layout()
    with pytest.raises(ValueError, match="keep: expected None with causal"):
        layer(
            pairs.expand(texts.pack(c.text)), pairs.cu_seqlens_pairs, c.images,
            pairs.cu_seqlens_images, causal=True, keep=pairs.keep(torch.tensor([0])),
        )  # fmt: skip
