"""Lists of tensors that the tests of the multi-tensor updates sample."""

import math

import torch
from hypothesis import strategies as st

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "transposed", "gaps", "offset"]


def tensor(shape, dtype, layout="contiguous", scale=1.0, seed=0, device="cpu"):
    """Random values in one of several layouts; what lies between the elements is NaN."""
    g = torch.Generator().manual_seed(seed)
    values = (scale * torch.randn(shape, generator=g)).to(dtype)
    if layout == "transposed":
        out = torch.empty(shape[::-1], dtype=dtype, device=device).permute(
            *range(len(shape) - 1, -1, -1)
        )
    elif layout == "gaps":
        wide = torch.full((*shape[:-1], 2 * shape[-1] + 1), math.nan, dtype=dtype, device=device)
        out = wide[..., : 2 * shape[-1] : 2]
    elif layout == "offset":  # at no multiple of a vector's size
        flat = torch.full((math.prod(shape) + 3,), math.nan, dtype=dtype, device=device)
        out = flat[3:].view(shape)
    else:
        out = torch.empty(shape, dtype=dtype, device=device)
    return out.copy_(values)


SHAPES = st.lists(
    st.sampled_from([(1,), (7,), (3, 0), (129,), (5, 31), (2, 3, 4, 5), (300, 130), (1, 1)]),
    min_size=1,
    max_size=5,
)
