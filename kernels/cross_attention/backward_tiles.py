"""Tiles of attention's backward kernels by (capability, bytes per element, padded width)."""

from .._core.support import triton_before
from .host import Table, Tile

# Tiles that spill with no Triton from 3.6 on. Keys come first where queries are too few for the
# side of 64 rows, and in blocks of keys. At 128 wide the queries of a tile, which every warp holds
# in registers without wgmma, leave room for 16 rows, and more take the general path.
FUSED_TILES: Table = {
    (80, 2, 64): (
        Tile(32, 32, 4, 2),
        Tile(64, 16, 4, 2, keys_first=False),
        Tile(
            128,
            16,
            8,
            2,
            keys_first=False,
            plain=Tile(128, 16, 4, 2, halves=2, keys_first=False),
        ),
    ),
    (80, 2, 128): (Tile(16, 32, 4, 2),),
    (80, 4, 64): (Tile(32, 32, 4, 1),),
    (80, 4, 128): (Tile(32, 16, 8, 1),),
    (90, 2, 64): (
        Tile(32, 64, 4, 2),
        Tile(64, 32, 4, 3, keys_first=False),
        Tile(
            128,
            32,
            8,
            3,
            keys_first=False,
            plain=Tile(
                128, 32, 8, 2 if triton_before(3, 8) else 3, keys_first=False, registers=128
            ),
        ),
    ),
    (90, 2, 128): (Tile(32, 32, 8, 2), Tile(64, 32, 8, 2)),
    (90, 4, 64): (Tile(32, 32, 8, 1),),
    (90, 4, 128): (Tile(32, 16, 16, 1),),
    (100, 2, 64): (Tile(32, 64, 4, 2), Tile(64, 64, 8, 2), Tile(128, 32, 8, 2)),
    (100, 2, 128): (Tile(32, 32, 4, 2), Tile(64, 32, 8, 2), Tile(128, 16, 8, 2)),
    (100, 4, 64): (Tile(32, 32, 8, 1),),
    (100, 4, 128): (Tile(32, 16, 8, 1),),
    (120, 2, 64): (
        Tile(32, 64, 4, 1),
        Tile(64, 32, 4, 2, keys_first=False),
        Tile(128, 16, 8, 2, keys_first=False),
    ),
    (120, 2, 128): (Tile(16, 32, 4, 2),),
    (120, 4, 64): (Tile(32, 32, 8, 1),),
    (120, 4, 128): (Tile(32, 16, 16 if triton_before(3, 8) else 8, 1),),
}
QUERY_TILES: Table = {
    (80, 2, 64): (Tile(64, 32, 4, 2, keys_first=False),),
    (80, 2, 128): (Tile(64, 32, 4, 2, keys_first=False),),
    (80, 4, 64): (Tile(32, 32, 8, 1),),
    (80, 4, 128): (Tile(32, 32, 8, 1),),
    (90, 2, 64): (Tile(64, 32, 4, 2, keys_first=False),),
    (90, 2, 128): (Tile(64, 32, 4, 2, keys_first=False),),
    (90, 4, 64): (Tile(32, 32, 8, 1),),
    (90, 4, 128): (Tile(32, 32, 8, 1),),
    (100, 2, 64): (Tile(64, 64, 8, 2),),
    (100, 2, 128): (Tile(64, 64, 8, 2),),
    (100, 4, 64): (Tile(32, 32, 8, 1),),
    (100, 4, 128): (Tile(32, 32, 8, 1),),
    (120, 2, 64): (Tile(32, 64, 4, 2),),
    (120, 2, 128): (Tile(32, 64, 8, 2),),
    (120, 4, 64): (Tile(32, 32, 8, 1),),
    (120, 4, 128): (Tile(32, 32, 8, 1),),
}
KEY_TILES: Table = {
    (80, 2, 64): (Tile(32, 64, 8, 2),),
    (80, 2, 128): (Tile(32, 64, 8, 2),),
    (80, 4, 64): (Tile(32, 32, 8, 1),),
    (80, 4, 128): (Tile(32, 16, 8, 1),),
    (90, 2, 64): (Tile(64, 64, 4, 2),),
    (90, 2, 128): (Tile(64, 64, 8, 2),),
    (90, 4, 64): (Tile(32, 32, 8, 1),),
    (90, 4, 128): (Tile(32, 16, 8, 1),),
    (100, 2, 64): (Tile(64, 64, 4, 2),),
    (100, 2, 128): (Tile(64, 64, 8, 2),),
    (100, 4, 64): (Tile(32, 32, 8, 1),),
    (100, 4, 128): (Tile(32, 16, 8, 1),),
    (120, 2, 64): (Tile(32, 64, 8, 2),),
    (120, 2, 128): (Tile(32, 64, 8, 2),),
    (120, 4, 64): (Tile(32, 32, 8, 1),),
    (120, 4, 128): (Tile(32, 16, 8, 1),),
}
