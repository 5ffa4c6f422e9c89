"""What gpu_check.py measures, in a process of its own: the device, its ceilings, the operators.

    PYTHONPATH=bench python -m _gpu.check_measure --out FILE --seconds 240

Writes JSON lines as it goes, each `{kind: value}`: "meta", "ceilings", "started" (the number of a
comparison), "rows", "missing". After an error that a CUDA process does not outlive, another process
goes on with `--first`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from _gpu.check_worker import LOST, is_sticky

# A comparison's share of the time: its rounds end after this many seconds.
ROUNDS_S = 0.5
COPY_BYTES, QUICK_COPY_BYTES = 4 << 30, 1 << 20
MATMUL, QUICK_MATMUL = 8192, 128


class Out:
    """The file of JSON lines."""

    def __init__(self, path: Path):
        self.path = path

    def __call__(self, **entry: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def describe(settings: Any, dry: bool) -> dict[str, Any]:
    """The circumstances: `report.meta`, what fastvlp can run here, and the GPU's clocks."""
    from _harness import report

    from fastvlp.ops import compiled, explain

    packages = ("triton", "transformers", "timm", "numpy", "pytest", "hypothesis")
    facts = report.meta(settings, packages)
    facts["native"] = compiled.load() or "loaded"
    facts["native_cuda"] = compiled.load_cuda() or "loaded"
    facts["runs"] = {op: explain(op).chosen for op in ("contrastive", "ema")} if not dry else {}
    facts["clocks"] = "none, a dry run" if dry else clocks()
    return facts


def clocks() -> str:
    """Clocks, power and temperature by nvidia-smi, or why they cannot be had."""
    fields = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,"
    fields += "temperature.gpu,driver_version"
    command = ("nvidia-smi", f"--query-gpu={fields}", "--format=csv")
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"not available: {error}"
    return found.stdout.strip()


def measure_ceilings(quick: bool) -> dict[str, float]:
    """GB/s of a copy, read and written bytes together, and TFLOP/s of a square matmul by dtype."""
    from _harness.timing import alternate

    size = QUICK_COPY_BYTES if quick else COPY_BYTES
    n = QUICK_MATMUL if quick else MATMUL
    source, target = (torch.empty(size, dtype=torch.int8, device="cuda") for _ in range(2))
    calls: dict[str, Callable[[], None]] = {"copy_gb_s": lambda: _drop(target.copy_(source))}
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32,
             "tf32": torch.float32}  # fmt: skip
    for name, dtype in kinds.items():
        a, b = (torch.randn(n, n, device="cuda").to(dtype) for _ in range(2))
        calls[f"matmul_{name}_tflop_s"] = _matmul(a, b, torch.empty_like(a), name == "tf32")
    for call in calls.values():
        for _ in range(3):
            call()
    times = alternate(
        calls, device="cuda", min_rounds=5, max_rounds=20, budget_s=5.0, label="ceilings"
    )
    best = {name: min(each) for name, each in times.items()}
    return {
        name: 2 * size / (ms * 1e6) if name == "copy_gb_s" else 2 * n**3 / (ms * 1e9)
        for name, ms in best.items()
    }


def _matmul(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, tf32: bool) -> Callable[[], None]:
    def call() -> None:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.mm(a, b, out=out)
        torch.backends.cuda.matmul.allow_tf32 = False

    return call


def _drop(_: Any) -> None:
    """A call that returns nothing has no results to be judged."""


def run_comparisons(args: argparse.Namespace, out: Out, ceilings: Mapping[str, float]) -> None:
    """The comparison `--first`, and those behind it until the time is up."""
    from _gpu import check_ops

    ends = time.monotonic() + args.seconds
    found = check_ops.comparisons(args.quick)
    for number, each in enumerate(found):
        if number < args.first:
            continue
        if number > args.first and time.monotonic() > ends:
            names = [rest.name for rest in found[number:]]
            out(missing=[{"name": name, "reason": "out of time", "remedy": ""} for name in names])
            return
        out(started=number, name=each.name)
        try:
            compare(args, out, each, ceilings)
        except Exception as error:
            summary = f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
            out(missing=[{"name": each.name, "reason": f"failed: {summary}", "remedy": ""}])
            if is_sticky(str(error)):
                sys.exit(LOST)
        torch.cuda.empty_cache()


def compare(args: argparse.Namespace, out: Out, each: Any, ceilings: Mapping[str, float]) -> None:
    from _harness import measure

    from _gpu import check_ops

    implementations = list(each.implementations)
    if args.dry_run:  # what torch.compile makes has nothing to run on
        implementations = check_ops.uncompiled(each)
        left_out = [c.name for c in each.implementations if c.compiled]
        out(missing=[
            {"name": f"{name}, {each.name}", "reason": "left out of a dry run", "remedy": ""}
            for name in left_out
        ])  # fmt: skip
        if not implementations:
            return
    rows, failed = measure.compare(
        each.op, implementations, each.build, each.tiny, args.settings, dtype=each.dtype,
        shape=each.shape, phase=each.phase, judged=each.judged, measure_memory=False,
        reference=None if args.dry_run else each.reference,
    )  # fmt: skip
    floor = check_ops.floor_row(each, ceilings)
    rows = [*rows, floor] if check_ops.ours_of(rows) else rows
    out(rows=check_ops.with_shares(rows, floor["ms"]))
    out(missing=[
        {"name": f"{one.name}, {each.name}", "reason": one.reason, "remedy": one.remedy}
        for one in [*each.missing, *failed]
    ])  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    flags = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    flags.add_argument("--out", type=Path, required=True)
    flags.add_argument("--seconds", type=float, required=True)
    flags.add_argument("--first", type=int, default=0)
    flags.add_argument("--ceilings", type=json.loads, help="measured before; JSON")
    flags.add_argument("--quick", action="store_true")
    flags.add_argument("--dry-run", action="store_true")
    args = flags.parse_args(argv)
    out = Out(args.out)
    with contextlib.ExitStack() as stack:
        device = None
        if args.dry_run:
            from _gpu import dry_device

            device = stack.enter_context(dry_device.DryDevice())
        elif not torch.cuda.is_available():
            raise SystemExit("gpu_check needs a CUDA device, and torch sees none; --dry-run: none")
        from _harness import measure

        args.settings = replace(
            measure.Settings("cuda", torch.get_num_threads(), args.quick), warmups=2,
            min_rounds=1 if args.dry_run else 5, max_rounds=1 if args.dry_run else 50,
            budget_s=ROUNDS_S,
        )  # fmt: skip
        if args.ceilings is None:
            out(meta=describe(args.settings, args.dry_run))
            args.ceilings = measure_ceilings(args.quick or args.dry_run)
            out(ceilings=args.ceilings)
        run_comparisons(args, out, args.ceilings)
        if device is not None:
            out(launches=len(device.launches))


if __name__ == "__main__":
    main()
