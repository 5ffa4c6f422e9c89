"""Host code shared by the attention kernels: checks, tile choice, the arguments of a launch."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton

from .._core import aot
from .._core.launch import INTERPRETED, capability_key
from .._core.support import attention_supported

LOG2E = 1.4426950408889634
# In place of a scale of 0: the product of a masked key is -inf and has to stay so.
SMALLEST_NORMAL = torch.finfo(torch.float32).tiny
# Vectors of 16 bytes are loaded where every stride is a multiple of them.
VECTOR_BYTES = 16
# Offsets within a tile are 32 bits wide: at most so many elements between rows, 128 rows in a tile.
LARGEST_STRIDE = 2**31 // 128


@dataclass(frozen=True)
class Tile:
    """One launch configuration: query rows and keys of a tile, warps, pipeline stages."""

    rows: int
    keys: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.keys}"


# A table holds tiles by ascending rows for each (capability, bytes per element, padded width).
Table = dict[tuple[int, int, int], tuple[Tile, ...]]


@dataclass(frozen=True)
class Sizes:
    """What a launch depends on besides the tensors."""

    segments: int
    heads: int
    width: int
    max_q: int
    max_k: int

    def programs(self, blocks: int) -> int:
        return self.segments * self.heads * blocks


def padded_width(width: int) -> int:
    """Tile width of a head; the tables have entries for 64, which serves less as well, and 128."""
    return max(16, triton.next_power_of_2(width))


def tiles_of(table: Table, interpreted: tuple[Tile, ...], q: torch.Tensor) -> tuple[Tile, ...]:
    """The tiles of a table that fit inputs like `q`, by ascending rows."""
    if INTERPRETED:
        return interpreted
    capability = capability_key(*torch.cuda.get_device_capability(q.device))
    return table[capability, q.element_size(), max(64, padded_width(q.shape[-1]))]


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU: with fewer programs than this some of them idle."""
    return 1 if INTERPRETED else _multiprocessors(device)


def check(q, k, v, cu_seqlens_q, cu_seqlens_k, key_mask, max_q: int, max_k: int) -> Sizes:
    """Raise ValueError unless the kernels take these inputs."""
    reasons = attention_supported(q, k, v)
    if reasons:
        raise ValueError("the Triton attention kernels cannot run: " + "; ".join(reasons))
    if (cu_seqlens_k is None) != (k.dim() == 4):
        raise ValueError(
            "k must be [n, L, H, d], or [total_k, H, d] with cu_seqlens_k; got shape "
            f"{tuple(k.shape)} and cu_seqlens_k {'missing' if cu_seqlens_k is None else 'given'}"
        )
    if key_mask is not None and key_mask.shape != k.shape[:-2]:
        raise ValueError(
            f"key_mask must have shape {tuple(k.shape[:-2])}, got {tuple(key_mask.shape)}"
        )
    return Sizes(len(cu_seqlens_q) - 1, q.shape[1], q.shape[2], max_q, max_k)


def launch_arguments(
    sizes: Sizes, q, k, v, cu_seqlens_q, cu_seqlens_k, key_mask, seed, scale, dropout_p, causal
) -> dict[str, Any]:
    """The arguments that all attention kernels share, by name."""
    packed = cu_seqlens_k is not None
    q, k, v = (t if t.stride(-3) < LARGEST_STRIDE else t.contiguous() for t in (q, k, v))
    k4, v4 = (t[None] if packed else t for t in (k, v))
    strides = {
        **dict(zip(("stride_qt", "stride_qh"), q.stride(), strict=False)),
        **dict(zip(("stride_kn", "stride_kt", "stride_kh"), k4.stride(), strict=False)),
        **dict(zip(("stride_vn", "stride_vt", "stride_vh"), v4.stride(), strict=False)),
    }
    unit = VECTOR_BYTES // q.element_size()
    unit = unit if all(s % unit == 0 for s in strides.values()) else 1
    threshold = int(dropout_p * 2.0**32)
    return {
        "q_ptr": q, "k_ptr": k, "v_ptr": v,
        "cu_q_ptr": cu_seqlens_q, "cu_k_ptr": cu_seqlens_k if packed else cu_seqlens_q,
        "mask_ptr": seed if key_mask is None else key_mask.contiguous().view(torch.uint8),
        "seed_ptr": seed,
        "heads": sizes.heads, "length": k4.shape[1], "total_q": q.shape[0],
        **{name: stride // unit for name, stride in strides.items()},
        "scale": scale, "scale_log2": max(scale * LOG2E, SMALLEST_NORMAL),
        "inverse_keep": 1 / (1 - dropout_p),
        "threshold": threshold - (threshold >> 31 << 32),
        "PACKED": packed, "MASKED": key_mask is not None, "DROPOUT": dropout_p > 0,
        "CAUSAL": causal, "D": sizes.width, "WIDTH": padded_width(sizes.width), "UNIT": unit,
        "UPCAST": INTERPRETED and q.dtype is torch.bfloat16,
    }  # fmt: skip


def tile_arguments(tile: Tile) -> dict[str, Any]:
    """Tile sizes and compiler options. Fused multiply-adds no longer come by default."""
    return {
        "BLOCK_M": tile.rows, "BLOCK_N": tile.keys,
        "num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True,
    }  # fmt: skip


def empty_result(like: torch.Tensor) -> torch.Tensor:
    """An uninitialised contiguous tensor for a result in the dtype of `like`.

    The interpreter truncates where it should round to bf16, so there the values stay fp32 until
    `rounded` rounds them.
    """
    wide = INTERPRETED and like.dtype is torch.bfloat16
    return torch.empty(like.shape, dtype=torch.float32 if wide else like.dtype, device=like.device)


def rounded(result: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return result.to(like.dtype)


POINTERS = dict.fromkeys(["q_ptr", "k_ptr", "v_ptr"], "*T") | {
    "cu_q_ptr": "*i32", "cu_k_ptr": "*i32", "mask_ptr": "*u8", "seed_ptr": "*i64",
}  # fmt: skip
INTEGERS = ("heads", "blocks", "length", "total_q", "threshold") + tuple(
    f"stride_{name}" for name in ("qt", "qh", "kn", "kt", "kh", "vn", "vt", "vh")
)
SCALARS = dict.fromkeys(INTEGERS, "i32") | dict.fromkeys(
    ["scale", "scale_log2", "inverse_keep"], "fp32"
)


def tile_cases(
    kernel: Any,
    table: Table,
    signature: dict[str, str],
    *,
    constants: dict[str, Any] | None = None,
    label: str = "",
    types: Iterable[str] = ("bf16", "fp32"),
    full: bool = True,
) -> list[aot.Case]:
    """Ahead-of-time cases of an attention kernel: every tile of the table that fits `types`.

    `signature` holds the argument types beyond the shared ones ("*T" is a pointer to the input
    type). `full` turns dropout, mask, packed keys and causality on: the most registers.
    """
    cases = []
    for (capability, element, width), tiles in table.items():
        for tile in tiles:
            for kind in types:
                if element != (4 if kind == "fp32" else 2):
                    continue
                own = {
                    name: t.replace("*T", f"*{kind}")
                    for name, t in (POINTERS | signature | SCALARS).items()
                }
                flags = dict.fromkeys(("PACKED", "DROPOUT", "CAUSAL"), full)
                name = kernel.__name__.removesuffix("_kernel")
                cases.append(
                    aot.Case(
                        name=f"{name}{label} {kind} {width}w {tile}{'' if full else ' plain'}",
                        kernel=kernel,
                        signature=own,
                        constants={
                            **flags, "MASKED": True, "D": width, "WIDTH": width,
                            "UNIT": VECTOR_BYTES // element, "UPCAST": False,
                            "BLOCK_M": tile.rows, "BLOCK_N": tile.keys, **(constants or {}),
                        },
                        capability=capability,
                        warps=tile.warps,
                        stages=tile.stages,
                        tensor_cores=kind != "fp32",
                    )
                )  # fmt: skip
    return cases
