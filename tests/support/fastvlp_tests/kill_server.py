"""Kills training runs at given moments and lets them resume; a process of its own, which forks.

    python -m fastvlp_tests.kill_server FOLDER SECONDS_KILLS EVENT_KILLS MODULE

A first run imports everything, and each other run is a fork; an empty file stands for the image of
the curve, which takes long to draw. FOLDER/whole is the run that nobody kills. Run
`time-i` is killed after a share of its time, chosen at random; run `event-i` kills itself at one of
the moments when it opens, renames, makes or removes something in its folder, among which are all
those inside of writing a checkpoint. fastvlp_tests.MODULE.train(folder) is what runs.
"""

import importlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from fastvlp_tests import seeds

seeds.inherit()

import torch  # noqa: E402

from fastvlp.train import logging  # noqa: E402

tiny = importlib.import_module(
    "fastvlp_tests." + (sys.argv[4] if len(sys.argv) > 4 else "tiny_run")
)
EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")


def forked(function, *arguments):
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        function(*arguments)
        code = 0
    finally:
        os._exit(code)


def status(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def train(folder, at=None, counts=None):
    seen = 0

    def watch(event, arguments):
        nonlocal seen
        if event in EVENTS and arguments and str(folder) in str(arguments[0]):
            seen += 1
            if seen == at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    tiny.train(folder)
    if counts is not None:
        counts.write_text(str(seen))


def main():
    folder, by_time, by_event = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    logging.draw_curve = lambda folder: (folder / "curve.png").write_bytes(b"")
    tiny.train(folder / "first")
    counts = folder / "count"
    begin = time.monotonic()
    assert status(forked(train, folder / "whole", None, counts)) == 0
    seconds, events = time.monotonic() - begin, int(counts.read_text())
    rng = random.Random(0)
    killed = []
    for i in range(by_time):
        child = forked(train, folder / f"time-{i}")
        # Into the middle of each of equal parts of the run, give or take.
        time.sleep(seconds * (i + rng.random()) / by_time)
        os.kill(child, signal.SIGKILL)
        killed.append((f"time-{i}", status(child)))
    for i in range(by_event):
        at = 1 + int(events * (i + rng.random()) / by_event)
        killed.append((f"event-{i}", status(forked(train, folder / f"event-{i}", at))))
    resumed = {name: status(forked(train, folder / name)) for name, _ in killed}
    print(json.dumps({"killed": dict(killed), "resumed": resumed, "events": events}))


if __name__ == "__main__":
    main()
