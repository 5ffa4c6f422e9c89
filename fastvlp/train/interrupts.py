"""Ctrl-C and SIGTERM: a run that is told to stop saves a checkpoint first."""

from __future__ import annotations

import os
import signal
import sys
import threading

import torch
import torch.distributed as dist

from fastvlp.distributed import group_device
from fastvlp.train.checkpointing import Checkpoints
from fastvlp.train.loop import Loop, Report
from fastvlp.train.parallel import Ranks

_SHOW_CURSOR = b"\x1b[?25h"


class Interrupted(KeyboardInterrupt):
    """A run stopped on request, with a checkpoint of its last step; `signum` is the signal."""

    def __init__(self, signum: int, step: int, steps: int) -> None:
        super().__init__(
            f"interrupted at step {step} of {steps}; the checkpoint is saved, and the same "
            f"command goes on from it"
        )
        self.signum = signum


class Interrupts:
    """A hook that ends the loop after the step in which SIGINT or SIGTERM came to any of the ranks.

    The step is finished and saved on all ranks, which compare what they received after each step,
    and `Interrupted` raised. A second SIGINT exits at once. Use it as a context; outside of the
    main thread, where Python receives no signals, it only heeds those of other ranks.
    """

    def __init__(self, checkpoints: Checkpoints, ranks: Ranks) -> None:
        self.checkpoints, self.ranks = checkpoints, ranks
        self._received = 0
        self._previous: dict[int, object] = {}

    def __call__(self, loop: Loop, report: Report) -> None:
        self.heed(loop)

    def heed(self, loop: Loop) -> None:
        """Saves the loop and raises `Interrupted` on all ranks if any of them was told to stop."""
        signum = self._of_any_rank()
        if signum:
            self.checkpoints.save(loop)
            self.checkpoints.wait()
            raise Interrupted(signum, loop.step, loop.steps)

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._receive)
        return self

    def __exit__(self, *error) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)

    def _of_any_rank(self) -> int:
        if self.ranks.group is None:
            return self._received
        signum = torch.tensor(self._received, device=group_device(self.ranks.group))
        dist.all_reduce(signum, dist.ReduceOp.MAX, group=self.ranks.group)
        return int(signum)

    def _receive(self, signum: int, frame: object) -> None:
        # Not by print, which a handler may have interrupted.
        if self._received and signum == signal.SIGINT:
            os.write(2, (_SHOW_CURSOR if sys.stderr.isatty() else b"") + b"\nstopped at once\n")
            os._exit(128 + signum)
        self._received = self._received or signum
        if self.ranks.is_first:
            os.write(2, b"\nsaving a checkpoint after this step; Ctrl-C again stops at once\n")
