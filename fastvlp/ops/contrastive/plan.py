"""How the contrastive losses cut the logits into blocks within a memory budget.

On a CPU blocks follow its caches and threads (`make_plan`), on a GPU chunks of rows its memory
(`make_gpu_plan`).
"""

import math
from dataclasses import dataclass

import torch

from ..._tracing import constant_result
from ...kernels import align
from .._core.gpu_plan import TILE, even_chunks, rows_within

# On a CPU. Keeps every logit of 8192 x 8192 pairs: such a batch costs three GEMMs, not four.
DEFAULT_WORKSPACE_BYTES = 288 << 20

# A tile of 512 x 512 logits, 1 MiB, stays in a core's L2 cache between the GEMM that
# makes it and the passes that read it (bench/NOTES.md has the sweep).
BLOCK = 512
_GRAIN = 32  # rows of the widest packed panel
_PADDING = 16  # floats added to each tile column; csrc/cpu/contrastive/kernel.h
_CHUNK_BYTES = 64 << 20


@dataclass(frozen=True)
class Plan:
    """Block sizes in rows, counts in blocks."""

    block_rows: int
    block_cols: int
    keep_blocks: int  # row blocks whose logits the forward pass keeps for the backward pass
    chunk_rows: int  # blocks computed again together in the backward pass
    chunk_cols: int

    def kept_floats(self, cols: int) -> int:
        """Size of the tiles that the forward pass keeps of logits with `cols` columns."""
        tiles = self.keep_blocks * -(-cols // self.block_cols)
        return tiles * _tile_bytes(self.block_rows, self.block_cols) // 4


def plan_for(x: torch.Tensor, cols: int, workspace_bytes: int | None, keep: bool) -> Plan:
    """Cuts the logits of features `x` [M, D] and `cols` others of their kind, for their device.

    `workspace_bytes` None: as much memory as suits the device. `keep`: as for `make_plan`.
    """
    if x.is_cuda:
        return make_gpu_plan(len(x), cols, x.shape[1], x.dtype, workspace_bytes, x.device)
    budget = DEFAULT_WORKSPACE_BYTES if workspace_bytes is None else workspace_bytes
    return make_plan(len(x), cols, x.shape[1], x.dtype, budget, keep)


def make_gpu_plan(
    rows: int,
    cols: int,
    dim: int,
    dtype: torch.dtype,
    workspace_bytes: int | None,
    device: torch.device,
) -> Plan:
    """Chunks of rows against all columns; nothing is kept.

    Counted against the budget: the gradients of a chunk's logits in the features' dtype, fp32
    gradients of its rows and their products with the rows, and the fp32 sums of half-precision
    gradients of the columns. A tile of rows is always taken.
    """
    if not rows or not cols:
        return Plan(_GRAIN, _GRAIN, 0, 0, 0)
    row_bytes = align(cols) * dtype.itemsize + 8 * dim
    sums_bytes = 0 if dtype == torch.float32 else 4 * dim * cols
    most = rows_within(workspace_bytes, row_bytes, sums_bytes, device)
    return Plan(even_chunks(rows, max(TILE, most)), cols, 0, 1, 1)


def make_plan(
    rows: int, cols: int, dim: int, dtype: torch.dtype, workspace_bytes: int, keep: bool
) -> Plan:
    """Cuts `rows` x `cols` logits of `dim`-wide features for `workspace_bytes` of a CPU's memory.

    Counted against the budget: kept logits, the logits of one chunk, and the fp32 sums of
    half-precision gradients that several chunks add to. At least one tile and those sums are
    always used. `keep`: whether a backward pass will follow.
    """
    if not rows or not cols:
        return Plan(_GRAIN, _GRAIN, 0, 0, 0)
    threads = _threads()
    block_rows, block_cols = _block(rows, BLOCK, threads), _block(cols, BLOCK, threads)
    row_blocks, col_blocks = -(-rows // block_rows), -(-cols // block_cols)
    tile_bytes = _tile_bytes(block_rows, block_cols)
    if row_blocks * col_blocks * tile_bytes <= workspace_bytes:
        return Plan(block_rows, block_cols, row_blocks if keep else 0, row_blocks, col_blocks)

    sums_bytes = 0 if dtype == torch.float32 else 4 * dim * (rows + cols)
    budget = max(0, workspace_bytes - sums_bytes)
    # A chunk should give every thread a block in both passes over it: more threads, a larger
    # chunk and, where the budget ends, smaller blocks.
    chunk_bytes = min(budget, max(_CHUNK_BYTES, 4 * (threads * BLOCK // 4) ** 2))
    limit = max(2 * _GRAIN, min(BLOCK, math.isqrt(chunk_bytes // 4) // threads))
    block_rows, block_cols = _block(rows, limit, threads), _block(cols, limit, threads)
    row_blocks, col_blocks = -(-rows // block_rows), -(-cols // block_cols)
    tile_bytes = _tile_bytes(block_rows, block_cols)
    tiles = max(1, chunk_bytes // tile_bytes)
    chunk_rows = min(_multiple(math.isqrt(tiles), threads), row_blocks)
    chunk_cols = min(_multiple(tiles // chunk_rows, threads), col_blocks)
    left = max(0, budget - chunk_rows * chunk_cols * tile_bytes)
    keep_blocks = min(left // (col_blocks * tile_bytes), row_blocks) if keep else 0
    return Plan(block_rows, block_cols, keep_blocks, chunk_rows, chunk_cols)


def _block(n: int, limit: int, threads: int) -> int:
    # Every thread gets a block, and the blocks are of nearly one size.
    blocks = max(-(-n // limit), min(threads, -(-n // _GRAIN)))
    return -(-n // (blocks * _GRAIN)) * _GRAIN


def _multiple(n: int, threads: int) -> int:
    return n // threads * threads if n >= threads else n


def _tile_bytes(block_rows: int, block_cols: int) -> int:
    return 4 * block_cols * (block_rows + _PADDING)


@constant_result
def _threads() -> int:
    return torch.get_num_threads()
