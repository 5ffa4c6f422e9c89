"""What cross_attention.py compares: attention of packed text to image tokens.

Every implementation starts from inputs prepared before the clock starts: fastvlp and the
variable-length kernels from packed rows, the others from rows padded to the longest. `tokens
first` means that these lie as a projection leaves them, [n, M, H, d], and `heads first` that they
have been copied to [n, H, M, d] (of fastvlp's the keys and values).
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from _harness.measure import BOUND, OURS, Implementation, Missing
from _harness.timing import Call, CpuClock, CudaClock
from torch import Tensor

from baselines.contrastive.softmax import compiled
from baselines.cross_attention.inputs import Case, Inputs, Padded, packed_results, pad, padded

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
SDPA_BACKENDS = {
    "sdpa flash": "FLASH_ATTENTION",
    "sdpa cudnn": "CUDNN_ATTENTION",
    "sdpa efficient": "EFFICIENT_ATTENTION",
}
NEEDS_GPU = "pip install -e '.[gpu]', then --device cuda"


def run(attend: Attend, tensors: Sequence[Tensor], upstream: Tensor, backward: bool) -> Call:
    """A call that computes the output and, if asked, the gradients to q, k and v."""
    leaves = [tensor.detach().requires_grad_(backward) for tensor in tensors]

    def call() -> dict[str, Tensor]:
        if not backward:
            with torch.no_grad():
                return {"out": attend(*leaves)}
        out = attend(*leaves)
        gradients = torch.autograd.grad(out, leaves, upstream)
        return {"out": out.detach()} | dict(zip(("d_q", "d_k", "d_v"), gradients, strict=True))

    return call


def ours(heads_first: bool, backward: bool, inputs: Inputs) -> Call:
    from fastvlp.ops import cross_attention

    keys = [inputs.k, inputs.v]
    if heads_first:
        keys = [each.transpose(1, 2).contiguous().transpose(1, 2) for each in keys]

    options: dict[str, Any] = {"max_seqlen_q": max(inputs.q_lengths)}
    if inputs.cu_k is not None:
        options["max_seqlen_k"] = max(inputs.k_lengths)
    if inputs.dropout:
        options |= {"dropout_p": inputs.dropout, "dropout_seed": 1}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return cross_attention(
            q, k, v, inputs.cu_q, inputs.cu_k, key_mask=inputs.key_mask, **options
        )

    return run(attend, (inputs.q, *keys), inputs.upstream, backward)


def peer(
    make: Callable[[Padded, float], Attend], heads_first: bool, backward: bool, inputs: Inputs
) -> Call:
    """A padded peer. `make` gets the padded inputs (for their mask) and the dropout rate."""
    given = padded(inputs)
    tensors = [t.transpose(1, 2) for t in (given.q, given.k, given.v, given.upstream)]
    if heads_first:
        tensors = [tensor.contiguous() for tensor in tensors]
    return run(make(given, inputs.dropout), tensors[:3], tensors[3], backward)


def sdpa(use_mask: bool, given: Padded, dropout: float) -> Attend:
    mask = None
    if use_mask:
        mask = given.mask
        if mask is None:  # every key counts, and the caller does not know
            mask = torch.ones(given.k.shape[:2], dtype=torch.bool, device=given.k.device)
        mask = mask[:, None, None, :]
    return functools.partial(F.scaled_dot_product_attention, attn_mask=mask, dropout_p=dropout)


def sdpa_backend(name: str, given: Padded, dropout: float) -> Attend:
    """SDPA restricted to one of its backends, on a GPU."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, name)):
            return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)

    return attend


def eager(given: Padded, dropout: float) -> Attend:
    hidden = None if given.mask is None else ~given.mask[:, None, None, :]
    scale = given.q.shape[-1] ** -0.5

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = (q * scale) @ k.transpose(-2, -1)
        if hidden is not None:
            logits = logits.masked_fill(hidden, -torch.inf)
        weights = logits.softmax(-1)
        if dropout:
            weights = F.dropout(weights, dropout)
        return weights @ v

    return attend


def eager_compiled(given: Padded, dropout: float) -> Attend:
    return compiled(functools.partial(eager, given, dropout))


def flex(given: Padded, dropout: float) -> Attend:
    """FlexAttention, compiled, with the mask's block form made before the clock starts."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    block_mask = None
    if given.mask is not None:
        mask = given.mask
        block_mask = create_block_mask(
            lambda b, h, row, key: mask[b, key],
            len(mask),
            None,
            given.q.shape[1],
            given.k.shape[1],
            device=str(mask.device),
        )
    return compiled(lambda: functools.partial(flex_attention, block_mask=block_mask))


def packed_keys(inputs: Inputs) -> tuple[list[Tensor], Tensor]:
    """k and v as [total_k, H, d] and their cumulative lengths."""
    if inputs.cu_k is not None:
        return [inputs.k, inputs.v], inputs.cu_k
    images, keys = inputs.k.shape[:2]
    starts = torch.arange(images + 1, dtype=torch.int32, device=inputs.q.device) * keys
    return [inputs.k.flatten(0, 1), inputs.v.flatten(0, 1)], starts


def varlen(kind: str, backward: bool, inputs: Inputs) -> Call:
    """The variable-length kernels of flash-attn, xformers and torch, from packed rows."""
    (k, v), cu_k = packed_keys(inputs)
    longest = max(inputs.q_lengths), max(inputs.k_lengths)
    if kind == "flash-attn":
        from flash_attn import flash_attn_varlen_func

        attend = functools.partial(
            flash_attn_varlen_func, cu_seqlens_q=inputs.cu_q, cu_seqlens_k=cu_k,
            max_seqlen_q=longest[0], max_seqlen_k=longest[1], dropout_p=inputs.dropout,
        )  # fmt: skip
    elif kind == "torch varlen_attn":
        from torch.nn.attention.varlen import varlen_attn

        attend = functools.partial(
            varlen_attn, cu_seq_q=inputs.cu_q, cu_seq_k=cu_k, max_q=longest[0], max_k=longest[1]
        )
    else:
        from xformers.ops import memory_efficient_attention
        from xformers.ops.fmha.attn_bias import BlockDiagonalMask

        bias = BlockDiagonalMask.from_seqlens(list(inputs.q_lengths), list(inputs.k_lengths))

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            rows = (each[None] for each in (q, k, v))
            return memory_efficient_attention(*rows, attn_bias=bias, p=inputs.dropout)[0]

    return run(attend, (inputs.q, k, v), inputs.upstream, backward)


def varlen_results(inputs: Inputs, results: dict[str, Tensor]) -> dict[str, Tensor]:
    keys = ("d_k", "d_v")
    return {n: t.view(inputs.k.shape) if n in keys else t for n, t in results.items()}


def implementations(case: Case, backward: bool) -> tuple[list[Implementation], list[Missing]]:
    """Ours, the bounds and every peer that can run here; and those that cannot, with reasons."""
    stored = ("S", "O", "dV", "dP", "dQ", "dK") if backward else ("S", "O")
    found = [
        Implementation(OURS, functools.partial(ours, False, backward)),
        Implementation(
            BOUND,
            functools.partial(matmuls, stored),
            bound=True,
            note=f"torch.bmm for the {len(stored)} matmuls alone, with weights that are kept",
            extra={"matmuls": len(stored)},
        ),
    ]
    if backward:
        again = (*stored, "S")
        found.append(
            Implementation(
                f"{BOUND} {len(again)} matmuls",
                functools.partial(matmuls, again),
                bound=True,
                note="the same, with QKᵀ computed again for the backward pass",
                extra={"matmuls": len(again)},
            )  # fmt: skip
        )
    if case.part != "self":  # packed keys have no heads-first layout of their own
        found.append(
            Implementation(f"{OURS}, heads first", functools.partial(ours, True, backward))
        )
    missing = []
    masked = case.has_mask() or case.part == "self"
    for layout in ("heads first", "tokens first"):
        add = functools.partial(_padded, layout=layout, backward=backward)
        if not masked:
            found.append(add("sdpa", functools.partial(sdpa, False)))
        found.append(add("sdpa mask", functools.partial(sdpa, True)))
        found.append(add("eager", eager))
        found.append(add("eager compiled", eager_compiled, compiled=True))
    if case.device == "cuda" and not masked:
        for name, kind in SDPA_BACKENDS.items():
            make = functools.partial(sdpa_backend, kind)
            found.append(_padded(name, make, "heads first", backward))
    if case.dropout:
        missing.append(Missing("flex_attention", "has no dropout"))
    elif backward and case.device == "cpu":
        missing.append(
            Missing("flex_attention", "its CPU kernel has no backward", "--phase fwd times forward")
        )
    else:
        found.append(_padded("flex_attention", flex, "heads first", backward, compiled=True))
    gpu_found, gpu_missing = _gpu_peers(case, backward)
    return found + gpu_found, missing + gpu_missing


def _padded(name, make, layout: str, backward: bool, compiled: bool = False) -> Implementation:
    return Implementation(
        f"{name}, {layout}",
        functools.partial(peer, make, layout == "heads first", backward),
        compiled=compiled,
        unify=packed_results,
    )


def _gpu_peers(case: Case, backward: bool) -> tuple[list[Implementation], list[Missing]]:
    found, missing = [], []
    modules = {
        "flash-attn": "flash_attn",
        "xformers": "xformers",
        "torch varlen_attn": "torch.nn.attention.varlen",
    }
    for name, module in modules.items():
        reason, remedy = "", ""
        if case.device != "cuda":
            reason, remedy = "runs on a GPU only", NEEDS_GPU
        elif importlib.util.find_spec(module) is None:
            reason, remedy = "not installed", "pip install -e '.[gpu]'"
        elif case.dtype == "fp32" and name != "xformers":
            reason = "has no float32"
        elif case.has_mask():
            reason = "takes no key mask with holes"
        elif case.dropout and name == "torch varlen_attn":
            reason = "has no dropout"
        if reason:
            missing.append(Missing(name, reason, remedy))
        else:
            make = functools.partial(varlen, name, backward)
            found.append(Implementation(name, make, unify=varlen_results))
    return found, missing


# The operands of each matmul, and the shape of its result: tile is [M, L].
_PRODUCTS = {
    "S": ("q", "k.T", "tile"),
    "O": ("tile", "v", "q"),
    "dV": ("tile.T", "q", "k"),
    "dP": ("q", "v.T", "tile"),
    "dQ": ("tile", "k", "q"),
    "dK": ("tile.T", "q", "k"),
}


def matmuls(names: Sequence[str], inputs: Inputs) -> Call:
    """The matmuls that no implementation can do without, by torch.bmm.

    Forward S = QKᵀ and O = PV; backward dV = PᵀdO, dP = dO Vᵀ, dQ = dS K, dK = dSᵀQ, and S
    again where the weights were not kept. As many images at once, over a reused tile of weights
    as in a fused kernel, as are fastest here.
    """
    sizes = sorted({1, min(4, len(inputs.q_lengths)), len(inputs.q_lengths)})
    calls = [_grouped_matmuls(names, inputs, size) for size in sizes]
    clock = CudaClock() if inputs.q.is_cuda else CpuClock()
    times = [min(clock(call) for _ in range(3)) for call in calls]
    return calls[times.index(min(times))]


def _grouped_matmuls(names: Sequence[str], inputs: Inputs, size: int) -> Call:
    groups = []
    (k, v), cu_k = packed_keys(inputs)
    for first in range(0, len(inputs.q_lengths), size):
        part = {}
        for name, packed, starts, lengths in (
            ("q", inputs.q, inputs.cu_q, inputs.q_lengths),
            ("k", k, cu_k, inputs.k_lengths),
            ("v", v, cu_k, inputs.k_lengths),
        ):
            here = lengths[first : first + size]
            rows = packed[int(starts[first]) : int(starts[first + len(here)])]
            part[name] = pad(rows, here).transpose(1, 2).flatten(0, 1).contiguous()
        groups.append(part)
    batch = max(len(part["q"]) for part in groups)
    rows, keys = (max(part[name].shape[1] for part in groups) for name in "qk")
    # Not zeros: a CPU that switches fewer bits may clock higher.
    weights, scores = torch.randn(2, batch, rows, keys, device=k.device).to(k.dtype)
    steps = []
    for part in groups:
        count, m, n = len(part["q"]), part["q"].shape[1], part["k"].shape[1]
        operands = part | {"tile": weights[:count, :m, :n]}
        results = {name: torch.empty_like(part[name]) for name in "qk"}
        results["tile"] = scores[:count, :m, :n]
        for name in names:
            left, right, out = _PRODUCTS[name]
            factors = [
                operands[each.removesuffix(".T")].transpose(1, 2)
                if each.endswith(".T")
                else operands[each]
                for each in (left, right)
            ]
            steps.append((*factors, results[out]))

    def call() -> None:
        for left, right, out in steps:
            torch.bmm(left, right, out=out)

    return call
