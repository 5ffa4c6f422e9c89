"""What programs write to a terminal."""

import contextlib
import os


def written_to(master: int) -> str:
    """All that was written to a terminal that is closed by now; one read may give a part of it."""
    pieces = []
    with contextlib.suppress(OSError):  # Linux's end of such a file
        while piece := os.read(master, 1 << 16):
            pieces.append(piece)
    return b"".join(pieces).decode()
