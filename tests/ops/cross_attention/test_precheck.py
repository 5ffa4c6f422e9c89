"""The short check of attention's arguments against the full one: they may not drift apart."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlp.ops import cross_attention
from fastvlp.ops.cross_attention.checks import check_inputs, operator_takes

NATIVE = (torch.float32, torch.bfloat16, torch.float16)
NAMES = (
    "q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "key_mask", "scale", "dropout_p", "max_seqlen_q",
    "max_seqlen_k",
)  # fmt: skip


class Subclass(torch.Tensor):
    pass


def spread(t):
    """The same values with every second element of the last axis left out."""
    return torch.stack([t, t], -1).flatten(-2)[..., ::2]


def first_row(t):
    return t[0]


ODD = {
    "rows": [
        torch.Tensor.double,
        torch.Tensor.half,
        torch.Tensor.long,
        lambda t: t.to("meta"),
        lambda t: t.as_subclass(Subclass),
        torch.nn.Parameter,
        spread,
        lambda t: t.mT.contiguous().mT,
        lambda t: t[..., :0],
        lambda t: t[..., 1:],
        lambda t: t[1:],
        lambda t: t[None],
        first_row,
        lambda t: t.tolist(),
        lambda t: None,
    ],
    "starts": [
        torch.Tensor.long,
        torch.Tensor.short,
        torch.Tensor.float,
        lambda t: t.to("meta"),
        lambda t: t.as_subclass(Subclass),
        spread,
        lambda t: t[None],
        lambda t: t[:0],
        lambda t: t[1:],
        first_row,
        lambda t: t.flip(0),
        lambda t: t + 1,
        lambda t: torch.cat([t, t[-1:]]),
        lambda t: t.tolist(),
        lambda t: None,
    ],
    "mask": [
        torch.Tensor.int,
        lambda t: t.to("meta"),
        lambda t: t.as_subclass(Subclass),
        spread,
        lambda t: t[1:],
        lambda t: t[None],
        lambda t: t.tolist(),
    ],
}
SCALES = [None, 0.5, 0.0, -2.0, 1e6, 1.1e6, -1e9, float("inf"), float("nan"), 1, True, "1",
          np.float32(1), torch.tensor(1.0)]  # fmt: skip
PROBABILITIES = [0.0, 0.25, 1.0, -0.1, float("nan"), 0, False, None, "0", np.float64(0.5),
                 torch.tensor(0.5)]  # fmt: skip
STARTS = [torch.int32, torch.int64]
BOUNDS = [None, 0, 7, -1, True, 2.0, "3", np.int64(3)]


@st.composite
def arguments(draw):
    """Usual arguments, of which up to two are odd."""
    heads, dim, segments = (draw(st.integers(1, n)) for n in (2, 4, 3))
    dtype = draw(st.sampled_from(NATIVE))
    lengths = st.lists(st.integers(0, 3), min_size=segments, max_size=segments)

    def starts(sizes):
        return torch.tensor([0, *np.cumsum(sizes)], dtype=draw(st.sampled_from(STARTS)))

    q_sizes, packed = draw(lengths), draw(st.booleans())
    k_sizes = draw(lengths) if packed else []
    leading = (sum(k_sizes),) if packed else (segments, draw(st.integers(0, 3)))
    found = {
        "q": torch.zeros(sum(q_sizes), heads, dim, dtype=dtype),
        "k": torch.zeros(*leading, heads, dim, dtype=dtype),
        "v": torch.zeros(*leading, heads, dim, dtype=dtype),
        "cu_seqlens_q": starts(q_sizes),
        "cu_seqlens_k": starts(k_sizes) if packed else None,
        "key_mask": torch.ones(leading, dtype=torch.bool) if draw(st.booleans()) else None,
        "scale": draw(st.sampled_from(SCALES[:5])),
        "dropout_p": draw(st.sampled_from(PROBABILITIES[:2])),
        "max_seqlen_q": draw(st.sampled_from(BOUNDS[:3])),
        "max_seqlen_k": draw(st.sampled_from(BOUNDS[:3])),
    }
    for name in draw(st.lists(st.sampled_from(NAMES), max_size=2, unique=True)):
        kind = "rows" if name in "qkv" else "mask" if name == "key_mask" else "starts"
        if name in ("scale", "dropout_p"):
            found[name] = draw(st.sampled_from(SCALES if name == "scale" else PROBABILITIES))
        elif name.startswith("max"):
            found[name] = draw(st.sampled_from(BOUNDS))
        elif found[name] is not None:
            change = draw(st.sampled_from(ODD[kind]))
            if len(found[name]) or change is not first_row:
                found[name] = change(found[name])
    return tuple(found.values())


def refusal(values):
    try:
        check_inputs(*values)
    except (TypeError, ValueError) as error:
        return error
    return None


def needs_no_conversion(values):
    """Whether arguments that pass the full check are promised the short way."""
    *tensors, scale, dropout_p, max_q, max_k = values
    tensors = [t for t in tensors if t is not None]
    return (
        all(type(t) is torch.Tensor and t.is_cpu for t in tensors)
        and tensors[0].dtype in NATIVE
        and all(t.stride(-1) == 1 for t in tensors[:3])
        and all(t.is_contiguous() for t in tensors[3:])
        and (scale is None or type(scale) is float)
        and type(dropout_p) is float
        and all(bound is None or type(bound) is int for bound in (max_q, max_k))
    )


@settings(max_examples=300)
@given(arguments())
def test_the_short_check_takes_what_the_full_one_passes(values):
    refused = refusal(values)
    if operator_takes(*values):
        assert refused is None
        # Nor has the operator itself anything to refuse.
        out = cross_attention(**dict(zip(NAMES, values, strict=True)))
        assert out.shape == values[0].shape and not out.any()
    else:
        assert refused is not None or not needs_no_conversion(values)


@pytest.mark.parametrize("packed", [False, True])
def test_the_short_check_stays_short(packed):
    q, k, starts = torch.zeros(6, 2, 8), torch.zeros(2, 3, 2, 8), torch.tensor([0, 4, 6])
    keys = k.flatten(0, 1) if packed else k
    k_starts = torch.tensor([0, 3, 6]) if packed else None
    values = q, keys, keys, starts, k_starts, None, None, 0.0, None, None
    calls = []
    sys.setprofile(lambda frame, event, argument: calls.append(event))
    try:
        taken = operator_takes(*values)
    finally:
        sys.setprofile(None)
    assert taken
    # Of functions in Python, itself included, and of functions in C; the rest is reading fields.
    assert calls.count("call") <= (11 if packed else 10)
    assert calls.count("c_call") <= (21 if packed else 15)
