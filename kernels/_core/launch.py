"""Host code shared by the kernels: tile choice, launches and their constants, fp32 matmuls."""

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton

from . import aot
from .support import ALIGNMENT, align, interpreting, supported

INTERPRETED = interpreting()
CAPABILITIES = (80, 90, 100, 120)
# For kernels that sum products between lanes. Fused into the first exchange of such a sum, a
# product is rounded by one of two lanes only: their sums differ, and which is stored is undefined.
UNFUSED = {"enable_fp_fusion": False}


@dataclass(frozen=True)
class Tile:
    """One launch configuration: tile sizes, L2 grouping (row blocks), warps, pipeline stages."""

    block_m: int
    block_n: int
    block_k: int
    group: int
    warps: int
    stages: int


# Small enough that a test with a few dozen rows crosses several tiles in each direction.
TILE_INTERPRETED = Tile(32, 16, 32, 2, 4, 1)


def capability_key(major: int, minor: int) -> int:
    """The entry of `CAPABILITIES` whose tiles fit a GPU of this compute capability.

    8.6, 8.7 and 8.9 have as little shared memory as 12.x and take its tiles, and so does anything
    newer than the table: the smallest tiles run everywhere.
    """
    if (major, minor) == (8, 0):
        return 80
    return {9: 90, 10: 100, 11: 100}.get(major, 120)


def tile_for(
    tiles: dict[tuple[int, int], Tile], x: torch.Tensor, interpreted: Tile = TILE_INTERPRETED
) -> Tile:
    """The tile of a table keyed by (capability, bytes per element) for inputs like `x`."""
    if INTERPRETED:
        return interpreted
    return tiles[capability_key(*torch.cuda.get_device_capability(x.device)), x.element_size()]


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU: with fewer programs than this some of them idle."""
    return 1 if INTERPRETED else _multiprocessors(device)


def tile_constants(tile: Tile, width: int, dtype: torch.dtype, precision: str) -> dict:
    """The constexpr arguments that every tile kernel takes for inputs of this width and dtype."""
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP": tile.group,
        "EVEN_K": width % tile.block_k == 0,
        "UPCAST": INTERPRETED and dtype is torch.bfloat16,
        "PRECISION": precision,
    }


def launch_options(tile: Tile) -> dict[str, int | bool]:
    """Compiler options of a tile's launch. Fused multiply-adds no longer come by default."""
    return {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}


def ceil_div(count: int, size: int) -> int:
    """As `triton.cdiv`, which takes microseconds outside of kernels."""
    return -(-count // size)


def tiles_of(rows: int, cols: int, tile: Tile) -> int:
    """How many tiles cover [rows, cols]."""
    return ceil_div(rows, tile.block_m) * ceil_div(cols, tile.block_n)


def on_device(x: torch.Tensor):
    """Triton launches on the current device, which need not be the one that holds `x`."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


# Compiled kernels, by all that Triton would compile them anew for.
_COMPILED: dict[tuple, Any] = {}


def launch(
    kernel: Any,
    programs: int | tuple[int, int, int],
    tensors: dict[str, torch.Tensor],
    numbers: dict[str, int | float],
    constants: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """kernel[programs](...) with all of these by name, in less of the host's time.

    Triton looks at each argument of each launch, to find what it has compiled for arguments of the
    kind. Here only what may change the kind is looked at: dtypes, alignment, constants, and of the
    integers that a kernel is specialised for whether they are 1 or a multiple of 16.

    Args:
        programs: their number, or that along each axis.
        tensors, numbers, constants: the kernel's arguments, together in the order of its
            parameters.
        options: of the compiler.

    Raises:
        ValueError: on the first launch of its kind, for other arguments than the kernel's.
    """
    arguments = tensors | numbers | constants
    grid = (programs, 1, 1) if isinstance(programs, int) else programs
    # Wider integers are arguments of another type.
    narrow = -(2**31) <= min(numbers.values()) and max(numbers.values()) < 2**31
    if INTERPRETED or not narrow:
        kernel[grid](**arguments, **options)
        return
    kinds = [(t.dtype, t.data_ptr() % 16) for t in tensors.values()]
    names = _specialised(kernel)
    special = [
        None if value == 1 else value % 16 == 0 for name, value in numbers.items() if name in names
    ]
    key = (id(kernel), current_device(), *kinds, *special, *constants.values(), *options.values())
    compiled = _COMPILED.get(key)
    if compiled is not None:
        compiled[grid](*arguments.values())
        return
    if [*arguments] != [*kernel.arg_names]:
        raise ValueError(
            f"{kernel.__name__}: expected the arguments {[*kernel.arg_names]} in this order, got "
            f"{[*arguments]}"
        )
    _COMPILED[key] = kernel[grid](**arguments, **options)


@cache
def _specialised(kernel: Any) -> frozenset[str]:
    """The numbers among a kernel's parameters of which it is specialised for some values."""
    return frozenset(
        parameter.name
        for parameter in kernel.params
        if not (parameter.is_constexpr or parameter.do_not_specialize)
        and not parameter.name.endswith("_ptr")
    )


def current_device() -> int:
    """The device on which Triton launches."""
    return triton.runtime.driver.active.get_current_device()


def require_supported(
    x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype = torch.float32, **others: torch.Tensor
) -> None:
    """Raise ValueError unless the kernels take x and y, and `others` are `dtype` on x's device."""
    reasons = supported(x, y)
    for name, t in others.items():
        if t.dtype is not dtype or t.device != x.device:
            wanted = str(dtype).removeprefix("torch.")
            reasons.append(
                f"{name} must be a {wanted} tensor on {x.device}, got {t.dtype} on {t.device}"
            )
    if reasons:
        raise ValueError("the Triton contrastive kernels cannot run: " + "; ".join(reasons))


def rows_per_chunk(rows: int, cols: int, element: int, workspace_bytes: int, tile: Tile) -> int:
    """How many rows of a [rows, cols] matrix of `element` bytes fit the workspace.

    Whole tiles where at least one fits. Raises ValueError where not even one row does.
    """
    one_row = align(cols) * element
    height = min(rows, workspace_bytes // one_row)
    if height < 1:
        raise ValueError(
            f"workspace_bytes is {workspace_bytes}, but one row of gradients against {cols} "
            f"columns takes {one_row} bytes; give at least that, better {one_row * tile.block_m}"
        )
    if tile.block_m < height < rows:
        height -= height % tile.block_m
    return height


def aligned_rows(x: torch.Tensor) -> torch.Tensor:
    """x [M, D], or a copy padded with zeros to [M, align(D)] where its rows are not aligned.

    Rows that start anywhere are loaded element by element, without asynchronous copies, at
    several times the cost of this one pass. Zeros add nothing to a matmul.
    """
    aligned = x.shape[1] % ALIGNMENT == 0 and x.stride(0) % ALIGNMENT == 0
    if aligned and x.data_ptr() % 16 == 0:
        return x
    padded = x.new_zeros(x.shape[0], align(x.shape[1]))
    padded[:, : x.shape[1]] = x
    return padded


def gradient_workspace(x: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """An uninitialised [rows, cols] matrix in x's dtype with aligned rows.

    The interpreter truncates where it should round to bf16, so there the values stay fp32 until
    `round_like` rounds them.
    """
    dtype = torch.float32 if INTERPRETED and x.dtype is torch.bfloat16 else x.dtype
    return torch.empty((rows, align(cols)), dtype=dtype, device=x.device)[:, :cols]


def float32_matmul(
    a: torch.Tensor, b: torch.Tensor, total: torch.Tensor | None = None
) -> torch.Tensor:
    """a @ b (+ total, overwriting it) in fp32, whatever the dtype of a and b.

    Half precision operands go to the vendor GEMM as they are and its fp32 accumulators come
    back unrounded, so summing over chunks loses nothing.
    """
    if a.dtype is torch.float32 or not a.is_cuda:
        a, b = a.float(), b.float()
        return torch.mm(a, b) if total is None else torch.addmm(total, a, b, out=total)
    if total is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


def tile_cases(
    kernel: Any,
    tiles: dict[tuple[int, int], Tile],
    *,
    signature: dict[str, str],
    constants: dict[str, Any],
    label: str = "",
    types: Iterable[str] = ("bf16", "fp16", "fp32"),
    ragged: bool = False,
) -> list[aot.Case]:
    """Ahead-of-time cases of a tile kernel: every tile of the table that fits one of `types`.

    `signature` holds the argument types beyond those that all tile kernels share ("*T" is a
    pointer to the input type). `ragged` is the case of a width that is no multiple of BLOCK_K.
    """
    cases = []
    for (capability, element), tile in tiles.items():
        for kind in types:
            if element != (4 if kind == "fp32" else 2):
                continue
            own = {k: v.replace("*T", f"*{kind}") for k, v in signature.items()}
            fixed = tile_constants(tile, 1 if ragged else tile.block_k, torch.float32, "ieee")
            shape = f"{tile.block_m}x{tile.block_n}x{tile.block_k}"
            name = f"{kernel.__name__.removesuffix('_kernel')}{label} {kind} {shape}"
            strides = ("D", "stride_x", "stride_y", *(k for k in own if k.startswith("stride_")))
            cases.append(
                aot.Case(
                    name=f"{name} ragged" if ragged else name,
                    kernel=kernel,
                    signature={
                        "x_ptr": f"*{kind}", "y_ptr": f"*{kind}", "scale_ptr": "*fp32",
                        "stride_x": "i32", "stride_y": "i32",
                        **dict.fromkeys(("M", "N", "D", "offset"), "i32"), **own,
                    },
                    constants={**fixed, **constants},
                    capability=capability,
                    warps=tile.warps,
                    stages=tile.stages,
                    aligned=strides,
                    tensor_cores=kind != "fp32",
                )
            )  # fmt: skip
    return cases
