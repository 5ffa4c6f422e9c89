"""A pytest plugin: one of several processes that share the tests of a GPU until a deadline.

Every test is accounted for at once in a file of JSON lines, `{"test", "outcome", "seconds",
"message"}`, so that what ran is known however the process ends; of several lines about a test the
last counts. The outcome is passed, failed, skipped, xfailed, "unfinished" of a test that is running
or ended its process, or "out of time" of those that the deadline left. After an error that CUDA
does not recover from, the process ends with status LOST; another one started with the same file
goes on behind it.

In a dry run (`--gpu-dry`) the device is a `dry_device.DryDevice`: tests run to their end, so that
what they launch is compiled, and nothing is judged.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

OUT_OF_TIME, UNFINISHED = "out of time", "unfinished"
# Exit status of a process whose CUDA context is lost, and what CUDA then says of every call.
LOST = 3
STICKY = (
    "illegal memory access", "misaligned address", "launch failure", "device-side assert",
    "illegal instruction", "hardware stack error", "launch timed out",
)  # fmt: skip
MESSAGE = 300  # characters


def pytest_addoption(parser):
    group = parser.getgroup("gpu check")
    group.addoption("--gpu-share", default="0/1", help="which tests: I/N, every N-th from the I-th")
    group.addoption("--gpu-results", type=Path, help="file of JSON lines to append to")
    group.addoption("--gpu-deadline", type=float, help="time.time() after which no test starts")
    group.addoption("--gpu-dry", action="store_true", help="compile launches, judge nothing")


def pytest_configure(config):
    if config.getoption("--gpu-results"):
        config.pluginmanager.register(Worker(config), "gpu-check-worker")


class Worker:
    def __init__(self, config):
        path = config.getoption("--gpu-results")
        before = path.read_text().splitlines() if path.exists() else []
        self.done = {json.loads(line)["test"] for line in before}
        self.file = path.open("a")
        self.deadline = config.getoption("--gpu-deadline") or float("inf")
        self.first, self.step = map(int, config.getoption("--gpu-share").split("/"))
        self.device = None
        if config.getoption("--gpu-dry"):
            self.device = _enter_dry_device()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        # Neighbours cost about the same: dealt out like cards, they spread over the processes.
        own = items[self.first :: self.step]
        items[:] = [item for item in own if item.nodeid not in self.done]

    def pytest_runtest_protocol(self, item, nextitem):
        if time.time() < self.deadline:
            self.write(item.nodeid, UNFINISHED, 0.0)
            return None
        self.write(item.nodeid, OUT_OF_TIME, 0.0)
        return True

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or not report.passed and report.when == "setup":
            outcome = "xfailed" if hasattr(report, "wasxfail") else report.outcome
            self.write(report.nodeid, outcome, report.duration, _message(report))
        elif report.failed:  # in teardown, after its test was accounted for
            self.write(report.nodeid, "failed", report.duration, _message(report))
        if report.failed and is_sticky(report.longreprtext):
            pytest.exit("the CUDA context is lost", returncode=LOST)

    def pytest_collectreport(self, report):
        if not report.passed:  # a module that cannot be imported here, say
            self.write(report.nodeid, report.outcome, 0.0, _message(report))

    def write(self, test: str, outcome: str, seconds: float, message: str = "") -> None:
        line = {"test": test, "outcome": outcome, "seconds": round(seconds, 3), "message": message}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

    def pytest_unconfigure(self):
        if self.device is not None:
            print(f"dry run: {len(self.device.launches)} launches", file=sys.stderr)
            self.device.__exit__(None, None, None)
        self.file.close()


def is_sticky(message: str) -> bool:
    """Whether it is of an error after which the process can use CUDA no more.

    torch, Triton and this package's own kernels each word it in their way; all name CUDA.
    """
    return "CUDA" in message and any(sign in message for sign in STICKY)


def _message(report) -> str:
    if report.passed:
        return ""
    if isinstance(report.longrepr, tuple):  # where and why a test was skipped
        return str(report.longrepr[2])[:MESSAGE]
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash else report.longrepr).strip()[:MESSAGE]


def _enter_dry_device():
    import torch
    from fastvlp_tests import tolerance

    from _gpu import dry_device

    if __debug__:
        raise pytest.UsageError("--gpu-dry: start python with -O, nothing was computed to judge")
    for module, name in ((tolerance, "assert_as_accurate"), (torch.testing, "assert_close")):
        setattr(module, name, lambda *_, **__: None)
    # It compares results with those of fake tensors; what it launches is the operator's launches.
    torch.library.opcheck = lambda operator, args, kwargs=None, **_: operator(*args, **kwargs or {})
    # The values of tests are small enough to be computed, whatever their size.
    device = dry_device.DryDevice(large=1 << 62)
    device.__enter__()
    return device
