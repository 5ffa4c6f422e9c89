"""Host code shared by the attention kernels: checks, tile choice, the arguments of a launch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import torch
import triton

from .._core import aot
from .._core.launch import INTERPRETED, capability_key, launch
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
    """One launch configuration: query rows and keys of a tile, warps, pipeline stages.

    Of gradient kernels also, halves: 2 where the rows are two tiles of half as many, one after the
    other. keys_first: whether tiles of weights are keys x queries rather than queries x keys.
    registers: at most so many for a thread, so that more blocks fit a multiprocessor. plain: the
    tile of as many rows to take where nothing is masked or dropped and nothing causal.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    halves: int = 1
    keys_first: bool = True
    registers: int | None = None
    plain: Tile | None = None

    def __str__(self) -> str:
        return f"{self.rows}x{self.keys}"


# A table holds tiles by ascending rows for each (capability, bytes per element, width): one of
# TABLE_WIDTHS, that of the widest heads that take them. Heads up to 80 wide may have none of their
# own and take those for 128.
Table = dict[tuple[int, int, int], tuple[Tile, ...]]
TABLE_WIDTHS = (64, 80, 128)


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


@cache  # Triton's function takes microseconds
def head_tiles(width: int, split: bool) -> dict[str, int]:
    """Widths of the tiles that hold a head: a power of two, or where a kernel can split heads into
    two tiles, WIDTH and REST."""
    if not split:
        return {"WIDTH": max(16, triton.next_power_of_2(width))}
    if 64 < width <= 80:
        return {"WIDTH": 64, "REST": 16}
    return head_tiles(width, False) | {"REST": 0}


def tiles_of(table: Table, interpreted: tuple[Tile, ...], q: torch.Tensor) -> tuple[Tile, ...]:
    """The tiles of a table that fit inputs like `q`, by ascending rows."""
    if INTERPRETED:
        return interpreted
    capability = capability_key(*torch.cuda.get_device_capability(q.device))
    width = next(width for width in TABLE_WIDTHS if width >= q.shape[-1])
    return entry(table, capability, q.element_size(), width)


def entry(table: Table, capability: int, element: int, width: int) -> tuple[Tile, ...]:
    found = table.get((capability, element, width))
    return table[capability, element, 128] if found is None else found


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


@dataclass(frozen=True)
class Arguments:
    """What the launches of a pass share: arguments by name, in the order of kernels' parameters."""

    sizes: Sizes
    tensors: dict[str, torch.Tensor]
    numbers: dict[str, int | float]
    constants: dict[str, Any]


def shared_arguments(
    sizes: Sizes, q, k, v, cu_seqlens_q, cu_seqlens_k, key_mask, seed, scale, dropout_p, causal,
    *, split: bool = False,
) -> Arguments:  # fmt: skip
    """split: for a kernel that takes heads in two tiles."""
    packed = cu_seqlens_k is not None
    q, k, v = (t if t.stride(-3) < LARGEST_STRIDE else t.contiguous() for t in (q, k, v))
    strides = (*q.stride()[:-1], *_key_strides(k, packed), *_key_strides(v, packed))
    unit = VECTOR_BYTES // q.element_size()
    if any(stride % unit for stride in strides):
        unit = 1
    threshold = int(dropout_p * 2.0**32)
    tensors = {
        "q_ptr": q, "k_ptr": k, "v_ptr": v,
        "cu_q_ptr": cu_seqlens_q, "cu_k_ptr": cu_seqlens_k if packed else cu_seqlens_q,
        "mask_ptr": q if key_mask is None else key_mask.contiguous().view(torch.uint8),
        "seed_ptr": seed if dropout_p else q,
    }  # fmt: skip
    numbers = {
        "heads": sizes.heads, "blocks": 0, "length": 0 if packed else k.shape[1],
        "total_q": q.shape[0], "threshold": threshold - (threshold >> 31 << 32),
        **{name: stride // unit for name, stride in zip(STRIDES, strides, strict=True)},
        "scale": scale, "scale_log2": max(scale * LOG2E, SMALLEST_NORMAL),
        "inverse_keep": 1 / (1 - dropout_p),
    }  # fmt: skip
    constants = {
        "PACKED": packed, "MASKED": key_mask is not None, "DROPOUT": dropout_p > 0,
        "CAUSAL": causal, "D": sizes.width, **head_tiles(sizes.width, split), "UNIT": unit,
        "UPCAST": INTERPRETED and q.dtype is torch.bfloat16,
    }  # fmt: skip
    return Arguments(sizes, tensors, numbers, constants)


def _key_strides(k: torch.Tensor, packed: bool) -> tuple[int, ...]:
    """Strides between images, keys and heads; packed keys have no images."""
    return (0, *k.stride()[:-1]) if packed else k.stride()[:-1]


def launch_tile(
    kernel: Any, tile: Tile, blocks: int, shared: Arguments, own: dict[str, torch.Tensor]
) -> None:
    """Launch a kernel with `blocks` programs for each segment and head.

    own: the kernel's pointers beyond the shared ones, in its order.
    """
    programs = shared.sizes.programs(blocks)
    if programs and shared.sizes.width:
        constants, options = tile_arguments(tile, tuple(kernel.arg_names))
        launch(
            kernel, programs, shared.tensors | own, shared.numbers | {"blocks": blocks},
            shared.constants | constants, options,
        )  # fmt: skip


@cache
def tile_arguments(
    tile: Tile, names: tuple[str, ...]
) -> tuple[dict[str, int | bool], dict[str, int | bool]]:
    """A tile's constants, those of them that are among a kernel's arguments, and the compiler's
    options. Fused multiply-adds no longer come by default."""
    constants = {
        "KEYS_FIRST": tile.keys_first, "HALVES": tile.halves,
        "BLOCK_M": tile.rows // tile.halves, "BLOCK_N": tile.keys,
    }  # fmt: skip
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    if tile.registers:
        options["maxnreg"] = tile.registers
    return {name: value for name, value in constants.items() if name in names}, options


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
STRIDES = tuple(f"stride_{name}" for name in ("qt", "qh", "kn", "kt", "kh", "vn", "vt", "vh"))
INTEGERS = ("heads", "blocks", "length", "total_q", "threshold", *STRIDES)
SCALARS = dict.fromkeys(INTEGERS, "i32") | dict.fromkeys(
    ["scale", "scale_log2", "inverse_keep"], "fp32"
)


def tile_cases(
    kernel: Any,
    table: Table,
    signature: dict[str, str],
    *,
    types: Iterable[str] = ("bf16", "fp32"),
) -> list[aot.Case]:
    """Ahead-of-time cases of an attention kernel: every tile of the table that fits `types`.

    `signature` holds the argument types beyond the shared ones ("*T" is a pointer to the input
    type). Dropout, mask, packed keys and causality are on: the most registers. They are off for
    tiles that are taken without.
    """
    cases = []
    split = "REST" in kernel.arg_names
    for capability, element, width in _widths(table, split):
        tiles = entry(table, capability, element, width)
        both = [(tile, True) for tile in tiles] + [(t.plain, False) for t in tiles if t.plain]
        for (tile, full), kind in product(both, types):
            if element != (4 if kind == "fp32" else 2):
                continue
            own = {
                name: t.replace("*T", f"*{kind}")
                for name, t in (POINTERS | signature | SCALARS).items()
            }
            flags = dict.fromkeys(("PACKED", "MASKED", "DROPOUT", "CAUSAL"), full)
            name = kernel.__name__.removesuffix("_kernel")
            cases.append(
                aot.Case(
                    name=f"{name} {kind} {width}w {tile}{'' if full else ' plain'}",
                    kernel=kernel,
                    signature=own,
                    constants={
                        **flags, "D": width, **head_tiles(width, split),
                        "UNIT": VECTOR_BYTES // element, "UPCAST": False,
                        **tile_arguments(tile, tuple(kernel.arg_names))[0],
                    },
                    capability=capability,
                    warps=tile.warps,
                    stages=tile.stages,
                    most_registers=tile.registers,
                    tensor_cores=kind != "fp32",
                )
            )  # fmt: skip
    return cases


def _widths(table: Table, split: bool) -> list[tuple[int, int, int]]:
    """The entries of a table, those of 80 that others stand for too where heads are split."""
    kinds = dict.fromkeys((capability, element) for capability, element, _ in table)
    every = [(*kind, width) for kind in kinds for width in TABLE_WIDTHS]
    return [each for each in every if each in table or split]
