"""Training runs that were killed at given moments and resumed, by kill_server.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

SUPPORT = Path(__file__).parents[1]


def kill_and_resume(folder, by_time, by_event, module="tiny_run"):
    """Runs of `module` in `folder`: `by_time` killed after a while, `by_event` at some event.

    Returns what kill_server.py prints: the exit codes of the runs killed and resumed, by name.
    """
    numbers = (str(by_time), str(by_event))
    done = subprocess.run(
        [sys.executable, "-m", "fastvlp_tests.kill_server", folder, *numbers, module],
        env={**os.environ, "PYTHONPATH": str(SUPPORT)}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])
