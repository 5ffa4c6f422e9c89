"""How the operators cut their logits on a GPU: chunks of whole rows, as large as memory allows.

Each chunk costs a few launches and GEMMs that fill the GPU only where it is tall, so that memory
decides, not caches as on a CPU.
"""

from functools import cache

import torch

from ..._tracing import constant_result

# Without a bound from the caller: the power of two below one part in so many of the memory that is
# free at first.
SHARE_OF_FREE_MEMORY = 20
# And as many rows at least: a chunk of them keeps every multiprocessor at work for several tiles.
LEAST_ROWS = 4096
# Rows of a matrix unit's tile: a chunk of whole ones leaves none of it idle.
TILE = 128


@constant_result
def default_workspace_bytes(device: torch.device) -> int:
    """The memory for a chunk where the caller sets no bound; 0 where there is no GPU to ask."""
    return _default_workspace_bytes(device)


@cache
def _default_workspace_bytes(device: torch.device) -> int:
    # Asked once: the caching allocator takes memory later that it is free to give to the workspace,
    # and chunks that changed their size between steps would change the sums' last bits. A power of
    # two, so that a little more or less free memory does not change them between runs either.
    if not torch.cuda.is_available():
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    return 1 << max(0, (free // SHARE_OF_FREE_MEMORY).bit_length() - 1)


def rows_within(
    workspace_bytes: int | None, row_bytes: int, other_bytes: int, device: torch.device
) -> int:
    """How many rows of `row_bytes` the workspace holds next to `other_bytes`; 0 if not even one.

    `workspace_bytes` None: the device's default, and at least LEAST_ROWS.
    """
    if workspace_bytes is None:
        fitting = (default_workspace_bytes(device) - other_bytes) // row_bytes
        return max(LEAST_ROWS, fitting)
    return max(0, (workspace_bytes - other_bytes) // row_bytes)


def even_chunks(rows: int, most: int) -> int:
    """The size of the fewest chunks of `rows` that are at most `most` each, of whole tiles."""
    if rows <= most:
        return rows
    whole = most - most % TILE if most >= TILE else most
    even = -(-rows // -(-rows // whole))
    return min(whole, -(-even // TILE) * TILE)
