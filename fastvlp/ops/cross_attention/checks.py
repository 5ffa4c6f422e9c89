"""What `cross_attention` accepts, and which implementation can take it."""

from numbers import Real
from typing import Any

import torch

from ...kernels import attention_supported
from .. import compiled
from .._core import backends
from .._core.checks import check_count, dtensor_classes
from .._core.dispatch import forced_backend

_STARTS_DTYPES = (torch.int32, torch.int64)
# Beyond, float32 logits have no digits left that could tell weights apart.
_LARGEST_SCALE = 1e6
NO_SEED = torch.zeros((), dtype=torch.int64, device="cpu")


def operator_takes(
    q, k, v, cu_seqlens_q, cu_seqlens_k, key_mask, scale, dropout_p, max_seqlen_q, max_seqlen_k
) -> bool:  # fmt: skip
    """Whether the CPU operator takes the arguments as they are: nothing to refuse or to convert.

    A short form of all the other checks, which take a millisecond where the caches hold nothing of
    this module, as between large matmuls of other operators.
    """
    # Without loops and slices, and with few calls: each takes longer than what is looked at.
    if torch.compiler.is_compiling() or not (
        type(q) is type(k) is type(v) is torch.Tensor
        and q.is_cpu
        and k.is_cpu
        and v.is_cpu
        and q.dim() == 3
        and q.dtype in backends.NATIVE_DTYPES
        and q.dtype == k.dtype == v.dtype
        and (q.is_contiguous() or q.stride(2) == 1)
        and (k.is_contiguous() or k.stride(-1) == 1)
        and (v.is_contiguous() or v.stride(-1) == 1)
        and type(dropout_p) is float
        and 0 <= dropout_p < 1
        and (scale is None or (type(scale) is float and abs(scale) <= _LARGEST_SCALE))
        and (max_seqlen_q is None or (type(max_seqlen_q) is int and max_seqlen_q >= 0))
        and (max_seqlen_k is None or (type(max_seqlen_k) is int and max_seqlen_k >= 0))
    ):
        return False
    rows, heads, dim = q.shape
    keys = k.shape
    if cu_seqlens_k is None:
        if len(keys) != 4:
            return False
        segments, total, key_heads, key_dim = keys
    else:
        if len(keys) != 3 or type(cu_seqlens_k) is not torch.Tensor or cu_seqlens_k.dim() != 1:
            return False
        segments = cu_seqlens_k.shape[0] - 1
        total, key_heads, key_dim = keys
        if not _are_starts(cu_seqlens_k, total, segments):
            return False
    return (
        heads == key_heads != 0
        and dim == key_dim != 0
        and v.shape == keys
        and (
            (cu_seqlens_q is cu_seqlens_k and rows == total)
            or _are_starts(cu_seqlens_q, rows, segments)
        )
        and (key_mask is None or _is_mask(key_mask, keys[:-2]))
        and forced_backend("cross_attention") in (None, "native")
        and not compiled.load()
    )


def _are_starts(starts: torch.Tensor, rows: int, segments: int) -> bool:
    if not (
        type(starts) is torch.Tensor
        and starts.is_cpu
        and starts.dtype in _STARTS_DTYPES
        and starts.dim() == 1
        and starts.is_contiguous()
    ):
        return False
    values = starts.tolist()
    return (
        len(values) == segments + 1 != 0
        and values[0] == 0
        and values[-1] == rows
        and values == sorted(values)
    )


def _is_mask(mask: torch.Tensor, shape: torch.Size) -> bool:
    return (
        type(mask) is torch.Tensor
        and mask.is_cpu
        and mask.dtype == torch.bool
        and mask.shape == shape
        and mask.is_contiguous()
    )


def check_inputs(
    q, k, v, cu_seqlens_q, cu_seqlens_k, key_mask, scale, dropout_p, max_seqlen_q, max_seqlen_k
) -> None:  # fmt: skip
    """Raises TypeError or ValueError, naming the argument, unless all fit together."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        _check_rows(name, t, q)
    if q.dim() != 3 or 0 in q.shape[1:]:
        raise ValueError(
            f"q: expected shape [total_q, H, d] with H and d at least 1, got {tuple(q.shape)}"
        )
    wanted = "[n, L, H, d]" if cu_seqlens_k is None else "[total_k, H, d], with cu_seqlens_k,"
    if k.dim() != (4 if cu_seqlens_k is None else 3) or k.shape[-2:] != q.shape[-2:]:
        raise ValueError(
            f"k: expected shape {wanted} with H, d = {tuple(q.shape[1:])} of q, got "
            f"{tuple(k.shape)}; pass cu_seqlens_k with packed keys and only with them"
        )
    if v.shape != k.shape:
        raise ValueError(f"v: expected the shape of k, {tuple(k.shape)}, got {tuple(v.shape)}")
    _check_starts("cu_seqlens_q", cu_seqlens_q, len(q), q.device)
    if cu_seqlens_k is not None:
        _check_starts("cu_seqlens_k", cu_seqlens_k, len(k), q.device)
    segments = len(k) if cu_seqlens_k is None else len(cu_seqlens_k) - 1
    if len(cu_seqlens_q) != segments + 1:
        raise ValueError(
            f"cu_seqlens_q: expected {segments + 1} values, one more than there are segments of "
            f"keys, got {len(cu_seqlens_q)}"
        )
    if key_mask is not None:
        _check_mask(key_mask, k)
    largest = torch.finfo(q.dtype).max if q.dtype == torch.float64 else _LARGEST_SCALE
    if scale is not None and not (isinstance(scale, Real) and abs(scale) <= largest):
        raise ValueError(
            f"scale: expected None or a number of magnitude up to {largest:g}, got {scale!r}"
        )
    if not isinstance(dropout_p, Real) or not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p: expected a probability in [0, 1), got {dropout_p!r}")
    for name, bound in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if bound is not None:
            check_count(name, bound)


def _check_rows(name: str, t: torch.Tensor, q: torch.Tensor) -> None:
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
    if isinstance(t, dtensor_classes()):
        raise TypeError(f"{name}: expected a plain tensor, got a DTensor; pass .to_local()")
    if not t.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point dtype, got {t.dtype}")
    if t.dtype != q.dtype:
        raise TypeError(f"{name}: expected the dtype of q, {q.dtype}, got {t.dtype}; cast one")
    if t.device != q.device:
        raise ValueError(f"{name}: expected the device of q, {q.device}, got {t.device}; move one")


def _check_starts(name: str, starts: torch.Tensor, rows: int, device: torch.device) -> None:
    if not isinstance(starts, torch.Tensor) or starts.dtype not in _STARTS_DTYPES:
        got = starts.dtype if isinstance(starts, torch.Tensor) else type(starts).__name__
        raise TypeError(f"{name}: expected an int32 or int64 tensor, got {got}")
    if starts.dim() != 1 or len(starts) == 0:
        raise ValueError(f"{name}: expected shape [segments + 1], got {tuple(starts.shape)}")
    if starts.device != device:
        raise ValueError(f"{name}: expected the device of q, {device}, got {starts.device}")
    if (
        device.type != "cpu"
        or torch.compiler.is_compiling()
        or isinstance(starts, torch._subclasses.FakeTensor)
    ):
        return  # looking would stall the stream, or cannot be traced
    values = starts.tolist()
    if (
        values[0] != 0
        or values[-1] != rows
        or any(a > b for a, b in zip(values[:-1], values[1:], strict=True))
    ):
        raise ValueError(
            f"{name}: expected values from 0 to the number of rows, {rows}, that never decrease, "
            f"got {values if len(values) <= 8 else [*values[:4], '...', *values[-3:]]}"
        )


def _check_mask(key_mask: torch.Tensor, k: torch.Tensor) -> None:
    if not isinstance(key_mask, torch.Tensor) or key_mask.dtype != torch.bool:
        got = key_mask.dtype if isinstance(key_mask, torch.Tensor) else type(key_mask).__name__
        raise TypeError(f"key_mask: expected a bool tensor, True for attended keys, got {got}")
    if key_mask.shape != k.shape[:-2]:
        raise ValueError(
            f"key_mask: expected one value per key, shape {tuple(k.shape[:-2])}, got "
            f"{tuple(key_mask.shape)}"
        )
    if key_mask.device != k.device:
        raise ValueError(
            f"key_mask: expected the device of q, {k.device}, got {key_mask.device}; move it"
        )


def seed_tensor(seed, dropout_p: float, device: torch.device) -> torch.Tensor:
    """The seed as an int64 tensor [] on the device, random where none is given; without dropout
    anything."""
    if isinstance(seed, torch.Tensor):
        if seed.numel() != 1 or seed.dtype != torch.int64 or seed.device != device:
            raise ValueError(
                f"dropout_seed: expected one int64 value on {device}, got {seed.dtype} of shape "
                f"{tuple(seed.shape)} on {seed.device}"
            )
        return seed.reshape(())
    if seed is None and dropout_p:
        return torch.randint(2**62, (), dtype=torch.int64, device=device)
    if seed is not None and not (isinstance(seed, int) and -(2**63) <= seed < 2**63):
        raise ValueError(f"dropout_seed: expected a 64-bit integer, got {seed!r}")
    if not dropout_p and not torch.compiler.is_compiling():
        # Nobody reads it: a number on the device would take a launch to write.
        return torch.zeros((), dtype=torch.int64, device="cpu")
    return torch.full((), seed or 0, dtype=torch.int64, device=device)


def longest(starts: torch.Tensor, bound: int | None, device: torch.device, rows: int) -> int:
    """An upper bound on the rows of a segment; waits for a GPU where none is given."""
    if bound is not None:
        return bound
    if device.type == "cpu" or torch.compiler.is_compiling():
        return rows  # the CPU kernels look for themselves, and compiled code cannot look
    return int((starts[1:] - starts[:-1]).max()) if len(starts) > 1 else 0


def distinct(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """The tensors, a repeated one as a view: torch.compile refuses one that is passed twice."""
    found = []
    for t in tensors:
        repeated = t is not None and any(t is other for other in found)
        found.append(t.view_as(t) if repeated else t)
    return found


def triton_reasons(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_, **__) -> list[str]:
    """Why the Triton kernels cannot take these tensors."""
    return backends.triton_reasons(attention_supported, q, k, v)


CANDIDATES: dict[str, Any] = {
    "triton": triton_reasons,
    "native": backends.native_reasons,
    "reference": backends.reference_reasons,
}
