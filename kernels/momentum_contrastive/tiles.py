"""What the kernels of the momentum-contrastive step share: blocks, loads, and their compilation."""

import torch
import triton
import triton.language as tl

from .._core import aot
from .._core.launch import INTERPRETED, Tile, tile_for

# Eight warps hold the sums of 64 rows x 256 columns in 64 registers a thread, or four in 128: then
# two programs share a multiprocessor, one of which multiplies while the other weighs. With 64 keys
# at a time four warps spill. Of float32 keys Triton loads none ahead in two stages, only ids, for
# which Triton 3.8 spills on compute capability 8.0.
TILES = {
    (80, 2): Tile(64, 64, 64, 1, 8, 2),
    (90, 2): Tile(64, 32, 64, 1, 4, 3),
    (100, 2): Tile(64, 64, 64, 1, 8, 2),
    (120, 2): Tile(64, 32, 64, 1, 8, 2),
    (80, 4): Tile(32, 32, 32, 1, 8, 1),
    (90, 4): Tile(32, 32, 32, 1, 8, 2),
    (100, 4): Tile(32, 32, 32, 1, 8, 2),
    (120, 4): Tile(32, 32, 32, 1, 8, 2),
}
TILE_INTERPRETED = Tile(32, 32, 32, 1, 4, 1)
# Warps for which a multiprocessor's registers are enough, however many a thread takes.
HELD_WARPS = 8

# Constants of every tiled kernel as the ahead-of-time cases have them.
AOT_TILED = {"EVEN_D": True, "UPCAST": False, "PRECISION": "ieee"}
# Widest block of the sums of keys; wider features take several programs, each with the logits.
WIDEST = 256
# Arguments of all the kernels by name; T is the dtype of the features.
_FLOATS = dict.fromkeys(
    ("temperature_ptr", "alpha_ptr", "reference_ptr", "sum_ptr", "keys_ptr", "loss_ptr",
     "d_temperature_ptr"), "*fp32"
)  # fmt: skip
_NAMES = ("image", "text", "image_momentum", "text_momentum", "image_queue", "text_queue")
_FEATURES = dict.fromkeys((*(f"{name}_ptr" for name in _NAMES), "d_image_ptr", "d_text_ptr"), "*T")
_INTEGERS = dict.fromkeys(
    (
        "ids_ptr",
        "queue_ids_ptr",
        "length_ptr",
        "seed_ptr",
        "text_negative_ptr",
        "image_negative_ptr",
    ),
    "*i64",
)
_SIZES = dict.fromkeys(("B", "D", "slices", *(f"stride_{name}" for name in _NAMES)), "i32")
_SIGNATURE = _FLOATS | _FEATURES | _INTEGERS | _SIZES | {"share": "fp32"}


@triton.jit
def select_side(direction, first_ptr, stride_first, second_ptr, stride_second):
    """(pointer, stride) of the first tensor for direction 0, of the second for direction 1."""
    if direction == 0:
        ptr, stride = first_ptr, tl.cast(stride_first, tl.int64)
    else:
        ptr, stride = second_ptr, tl.cast(stride_second, tl.int64)
    return ptr, stride


@triton.jit
def load_rows(
    ptr, row, last, stride, depth, D, EVEN_D: tl.constexpr, UPCAST: tl.constexpr
):  # fmt: skip
    """Rows of features; those past the end repeat the last one, columns past the end are 0."""
    at = ptr + tl.minimum(row, last).to(tl.int64)[:, None] * stride + depth[None, :]
    if EVEN_D:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=(depth < D)[None, :], other=0.0)
    return x.to(tl.float32) if UPCAST else x


def power_of_two(count: int) -> int:
    """As `triton.next_power_of_2`, which takes microseconds outside of kernels."""
    return 1 << (count - 1).bit_length()


def tile_of(x: torch.Tensor) -> Tile:
    return tile_for(TILES, x, TILE_INTERPRETED)


def tile_constants(tile: Tile, width: int, dtype: torch.dtype, precision: str) -> dict:
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "UPCAST": INTERPRETED and dtype is torch.bfloat16,
        "PRECISION": precision,
        "EVEN_D": width % tile.block_k == 0,
    }


def aot_kinds(
    kernel, label, types, constants, warps=None, tensor_cores=True, fusion=True
) -> list[aot.Case]:
    """The cases of one kernel for every GPU and every dtype of `types`."""
    signature = {
        k: v for k, v in _SIGNATURE.items() if k in kernel.arg_names and k not in constants
    }
    cases = []
    for (capability, element), tile in TILES.items():
        for kind in types:
            if element != (4 if kind == "fp32" else 2):
                continue
            own = {k: v.replace("*T", f"*{kind}") for k, v in signature.items()}
            tiles = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
            cases.append(
                aot.Case(
                    name=f"momentum-{label} {kind} {tile.block_m}x{tile.block_n}x{tile.block_k}",
                    kernel=kernel,
                    signature=own,
                    constants=({} if warps else tiles) | constants,
                    capability=capability,
                    warps=warps or tile.warps,
                    stages=tile.stages,
                    aligned=("D", *(k for k in own if k.startswith("stride_"))),
                    tensor_cores=tensor_cores and kind != "fp32",
                    fusion=fusion,
                )
            )
    return cases
