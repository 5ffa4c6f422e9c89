import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# The benchmarks are scripts: they find each other in their own folder. The processes that they
# start find functions of these tests by the names that pytest gives them, from the root on.
sys.path += [str(ROOT / "bench"), str(ROOT)]
