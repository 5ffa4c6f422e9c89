"""Where fastvlp keeps what it has built."""

from __future__ import annotations

import os
from pathlib import Path

from fastvlp.data.optional import require


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """``cache_dir`` if given, else ``$FASTVLP_CACHE``, else the user's cache folder for fastvlp.

    The folder is not created.
    """
    chosen = cache_dir or os.environ.get("FASTVLP_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(require("platformdirs").user_cache_dir("fastvlp"))
