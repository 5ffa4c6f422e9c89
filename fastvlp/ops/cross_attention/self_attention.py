"""Self-attention of the towers: softmax(scale q kᵀ) v by the fastest kernel at hand."""

import importlib
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._tracing import constant_result
from .._core.backends import native_reasons
from .._core.checks import check_tensor
from .._core.dispatch import choose, forced_backend, register_backends
from .api import cross_attention

HALF = (torch.bfloat16, torch.float16)
# The compute capabilities on which a package is preferred to torch's own kernels.
PREFERRED_ON = {"flash_attn": 8, "xformers": 9}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attention of each query row to the keys of its own sequence.

        p_ij = softmax of scale <q_i, k_j> over the keys j that row i attends
        out_i = sum_j p_ij v_j

    Source: Vaswani et al., "Attention is all you need", arXiv 1706.03762, section 3.2.

    Cost for B sequences of L tokens: 4 B H L^2 d FLOP forward and 10 B H L^2 d backward; memory
    beyond the results is linear in L. Whether the backward pass repeats bit for bit is the kernels'
    affair: on a GPU it does under `torch.use_deterministic_algorithms(True)`.

    The backends, in order of preference; `fastvlp.ops.explain("attention", q, k, v, ...)` says
    which one runs and why not the others, and FASTVLP_ATTENTION names one to be used wherever it
    can:

    - `flash_attn`: flash-attn 2 (`pip install -e '.[gpu]'`): half precision without a mask on GPUs
      of compute capability 8.x;
    - `xformers`: the same tensors on capability 9.0, where it brings the FlashAttention-3 kernels;
    - `native`: `fastvlp.ops.cross_attention` on the CPU, each sequence a segment of its own. With
      50 to 577 tokens it takes 0.4 to 0.75 of the time of torch's kernel, forward and backward;
    - `sdpa`: torch's scaled_dot_product_attention, everywhere else. On capability 10 and above it
      has kernels that the two packages lack.

    Args:
        q: [batch, queries, heads, head_dim], float32, float64, bfloat16 or float16; any strides,
            e.g. a view of a joint projection.
        k, v: [batch, keys, heads, head_dim], same dtype and device.
        key_mask: bool [batch, keys], False for masked keys, in any pattern. They may
            hold NaN; a sequence without any key gives 0.
        causal: row i attends keys 0 .. i only; as many queries as keys.
        scale: of the logits; None for head_dim^-0.5.

    Returns:
        [batch, queries, heads, head_dim] in the dtype of `q`.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
        RuntimeError: FASTVLP_ATTENTION names a backend that cannot run.

    Examples:
        >>> import torch
        >>> from fastvlp.nn import attention
        >>> q, k, v = torch.randn(3, 2, 50, 4, 16)
        >>> attention(q, k, v).shape
        torch.Size([2, 50, 4, 16])
    """
    _check(q, k, v, key_mask, causal)
    backend = choose("attention", q, k, v, key_mask=key_mask, causal=causal, scale=scale)
    return _BACKENDS[backend](q, k, v, key_mask, causal, scale)


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """The definition of `attention`, any floating dtype; all weights at once."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if key_mask is not None:
        k, v = _zeroed(k, key_mask), _zeroed(v, key_mask)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    logits = (q * scale) @ k.transpose(-1, -2)
    if causal:
        future = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        logits = logits.masked_fill(future, -torch.inf)
    if key_mask is None:
        return (logits.softmax(-1) @ v).transpose(1, 2)
    logits = logits.masked_fill(~key_mask[:, None, None], -torch.inf)
    some = logits.amax(-1, keepdim=True) > -torch.inf
    weights = torch.where(some, logits, 0.0).softmax(-1) * some
    return (weights @ v).transpose(1, 2)


def _zeroed(x: Tensor, key_mask: Tensor) -> Tensor:
    # A weight of zero would let the NaN of a masked key through.
    return x.masked_fill(~key_mask[:, :, None, None], 0)


def _check(q, k, v, key_mask, causal):
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x, floating=None)
        if x.dim() != 4:
            raise ValueError(
                f"{name}: expected [batch, length, heads, head_dim], got shape {tuple(x.shape)}"
            )
        if x.dtype != q.dtype or not x.is_floating_point():
            raise TypeError(f"{name}: expected the floating dtype of q, {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected the device of q, {q.device}, got {x.device}")
    expected = (q.shape[0], k.shape[1], *q.shape[2:])
    for name, x in (("k", k), ("v", v)):
        if tuple(x.shape) != expected:
            raise ValueError(f"{name}: expected shape {expected}, got {tuple(x.shape)}")
    if causal and q.shape[1] != k.shape[1]:
        raise ValueError(
            f"causal: expected as many queries as keys, got {q.shape[1]} and {k.shape[1]}"
        )
    if key_mask is None:
        return
    check_tensor("key_mask", key_mask, floating=None)
    if key_mask.dtype != torch.bool:
        raise TypeError(f"key_mask: expected torch.bool, got {key_mask.dtype}")
    if tuple(key_mask.shape) != expected[:2]:
        raise ValueError(f"key_mask: expected shape {expected[:2]}, got {tuple(key_mask.shape)}")
    if key_mask.device != q.device:
        raise ValueError(f"key_mask: expected the device of q, {q.device}, got {key_mask.device}")


def _attend_cross_attention(q, k, v, key_mask, causal, scale):
    batch, length = q.shape[:2]
    starts = length * torch.arange(batch + 1, dtype=torch.int32, device=q.device)
    out: Any = cross_attention(
        q.flatten(0, 1), k, v, starts, key_mask=key_mask, causal=causal, scale=scale,
        max_seqlen_q=length,
    )  # fmt: skip
    return out.view(q.shape)


def _attend_sdpa(q, k, v, key_mask, causal, scale):
    allowed = None
    if key_mask is not None:
        k, v = _zeroed(k, key_mask), _zeroed(v, key_mask)
        allowed = key_mask[:, None, None]
        if causal:  # SDPA takes either a mask or is_causal
            length = q.shape[1]
            past = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
            allowed, causal = allowed & past, False
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if scale == 0:  # torch's kernels multiply the -infinity of masked keys by the scale too
        q, scale = q * 0, 1.0
    out = F.scaled_dot_product_attention(q, k, v, allowed, is_causal=causal, scale=scale)
    return out.transpose(1, 2)


def _attend_flash_attn(q, k, v, key_mask, causal, scale):
    from flash_attn import flash_attn_func

    deterministic = torch.are_deterministic_algorithms_enabled()
    return flash_attn_func(q, k, v, softmax_scale=scale, causal=causal, deterministic=deterministic)


def _attend_xformers(q, k, v, key_mask, causal, scale):
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    bias = LowerTriangularMask() if causal else None
    return memory_efficient_attention(q, k, v, attn_bias=bias, scale=scale)


_BACKENDS = {
    "flash_attn": _attend_flash_attn,
    "xformers": _attend_xformers,
    "native": _attend_cross_attention,
    "sdpa": _attend_sdpa,
}


def _package_reasons(package: str, q: Tensor, key_mask: Tensor | None) -> list[str]:
    """Why a GPU package cannot, or had better not, take these tensors."""
    if q.device.type != "cuda":
        return [f"{package} runs on CUDA devices, q is on {q.device}"]
    reasons = []
    if q.dtype not in HALF:
        reasons.append(f"its kernels for dtype {q.dtype} are torch's; bfloat16 and float16 gain")
    if q.shape[-1] > 256:
        reasons.append(f"head_dim {q.shape[-1]} is above 256")
    if key_mask is not None:
        reasons.append("a key mask needs torch's memory-efficient kernel")
    capability = _capability(q.device)
    wanted = PREFERRED_ON[package]
    if capability < 8:
        reasons.append(f"compute capability {capability}.x is below 8.0")
    elif capability != wanted and forced_backend("attention") != package:
        reasons.append(
            f"preferred on compute capability {wanted}.x only, this device has {capability}.x; "
            f"FASTVLP_ATTENTION={package} asks for it all the same"
        )
    return reasons + list(_import_error(package))


def _flash_attn_reasons(q, *_, key_mask=None, **__):
    return _package_reasons("flash_attn", q, key_mask)


def _xformers_reasons(q, *_, key_mask=None, **__):
    reasons = _package_reasons("xformers", q, key_mask)
    if q.device.type == "cuda" and torch.are_deterministic_algorithms_enabled():
        reasons.append("its backward pass is not bound by torch.use_deterministic_algorithms(True)")
    return reasons


def _native_reasons(q, *_, **__):
    if forced_backend("cross_attention") == "reference":
        return ["FASTVLP_BACKEND=reference asks the operator for its reference"]
    return native_reasons(q)


def _sdpa_reasons(*_, **__):
    return []


@constant_result
def _capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


# A package that is there but does not load (built against another torch) must not end the run.
@constant_result
def _import_error(package: str) -> tuple[str, ...]:
    return _import(package)


@cache
def _import(package: str) -> tuple[str, ...]:
    try:
        importlib.import_module("xformers.ops" if package == "xformers" else package)
    except Exception as error:
        return (f"{package} does not import ({error}); pip install -e '.[gpu]'",)
    return ()


register_backends(
    "attention",
    example={"q": (1, 4, 1, 8), "k": (1, 4, 1, 8), "v": (1, 4, 1, 8)},
    variable="FASTVLP_ATTENTION",
    flash_attn=_flash_attn_reasons,
    xformers=_xformers_reasons,
    native=_native_reasons,
    sdpa=_sdpa_reasons,
)
