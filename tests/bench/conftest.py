import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# The benchmarks are scripts: they find each other in their own folder. The processes that they
# start find functions of these tests by the names that pytest gives them, from the root on.
sys.path += [str(ROOT / "bench"), str(ROOT)]


@pytest.fixture(scope="session", autouse=True)
def fork_server():
    """Has what the benchmarks' processes import before the first of them is forked from it."""
    from _harness import memory, ranks

    memory.preload(*ranks.PRELOADED)
