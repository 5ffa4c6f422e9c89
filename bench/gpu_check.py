"""Tests and measures everything on a GPU, in one command of under nine minutes.

    python bench/gpu_check.py                      # on the machine with the GPU
    python bench/gpu_check.py --prepare FOLDER     # elsewhere, what that machine needs: no network
    python bench/gpu_check.py --dry-run            # the whole command without a GPU

Stages, each with a share of the time: the tests that run on the device (`pytest -m gpu`) in
parallel processes; then the rates of a copy and of matmuls, and every operator with its peers at
the README's sizes and at N = 8k, 32k, 65k. Results are written to bench/results as they come, so
that a run that is cut off keeps what it has; a short table comes last. A stage that fails does not
stop the next, and what was left out is listed with its reason.

A dry run executes and measures nothing: launches are compiled, times are made up and stay out of
bench/results.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _gpu import check_folder
from _gpu.check_worker import LOST
from _harness.help import HelpFormatter

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
SECONDS = 510.0
# Of the time that is left when a stage begins.
SHARES = {"libraries": 0.3, "tests": 0.5, "measurements": 1.0}
# Seconds that the tests' processes get beyond their deadline to end their last test.
GRACE_S = 15.0
# New processes of one kind after errors that end their CUDA context.
RESTARTS = 5
KEPT_EVERY_S = 10.0  # of the tests' outcomes so far
LISTED = 12  # failures and omissions printed; the JSON has all
OURS, BOUND = "fastvlp", "floor"  # harness's, without importing torch


class Results:
    """The JSON, rewritten whole after everything that comes; rows as those of every benchmark."""

    def __init__(self, path: Path | None, dry_run: bool):
        self.path, self.dry_run = path, dry_run
        self.meta: dict[str, Any] = {"complete": False, "dry_run": dry_run, "stages": {}}
        self.rows: list[dict[str, Any]] = []
        self.missing: list[dict[str, str]] = []

    def take(self, entry: Mapping[str, Any]) -> None:
        """A line of _gpu/check_measure.py."""
        self.meta |= entry.get("meta", {})
        self.meta |= {key: entry[key] for key in ("ceilings", "launches") if key in entry}
        self.rows += entry.get("rows", [])
        self.missing += entry.get("missing", [])

    def write(self) -> None:
        if self.path is None:
            if self.dry_run:
                return
            device = "".join(c if c.isalnum() else "-" for c in self.meta["gpu"])
            date = datetime.date.today().isoformat()
            self.path = BENCH / "results" / f"gpu_check-{device}-{date}.json"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"meta": self.meta | {"missing": self.missing}, "rows": self.rows},
                          indent=1)  # fmt: skip
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text(text + "\n")
        partial.replace(self.path)


def prepare_libraries(
    args: argparse.Namespace, results: Results, scratch: Path, seconds: float
) -> None:
    """The compiled libraries, built where those that came along do not load."""
    results.meta["libraries"] = check_folder.build_if_needed(ROOT, seconds)


def run_tests(args: argparse.Namespace, results: Results, scratch: Path, seconds: float) -> None:
    """`pytest -m gpu` in `--workers` processes until the time is up."""
    known = check_folder.known_tests(ROOT)
    files = sorted({test.partition("::")[0] for test in known}) if known else ["tests"]
    if args.quick:
        files = [QUICK_TESTS]
    deadline = time.time() + seconds - GRACE_S
    command = [sys.executable, "-m", "pytest", "-q", "-p", "_gpu.check_worker", "--tb=short",
               "-p", "no:cacheprovider", "--continue-on-collection-errors", "--device", "cuda",
               "-m", "gpu", "--gpu-deadline", str(deadline)]  # fmt: skip
    if args.quick:
        command += ["-k", QUICK_SELECTION]
    environment = _environment(args)
    if args.dry_run:
        command += ["--gpu-dry", "--assert=plain"]
        environment["PYTHONOPTIMIZE"] = "1"
    shares = [
        Share(command + ["--gpu-share", f"{index}/{args.workers}"], files, environment,
              scratch / f"tests{index}.jsonl", scratch / f"tests{index}.log")
        for index in range(args.workers)
    ]  # fmt: skip
    written = time.monotonic()
    while any([share.is_running() for share in shares]) and time.time() < deadline + GRACE_S:
        time.sleep(0.2)
        if time.monotonic() > written + KEPT_EVERY_S:
            results.meta["tests"] = outcomes(shares, [])
            results.write()
            written = time.monotonic()
    for share in shares:
        share.end()
    results.meta["tests"] = outcomes(shares, [] if args.quick else known)


def outcomes(shares: Sequence[Share], known: Sequence[str]) -> dict[str, Any]:
    """What became of the tests; of `known` ones that no process accounted for, too."""
    found: dict[str, dict[str, Any]] = {}
    trouble = []
    for share in shares:
        found |= {each["test"]: each for each in _lines(share.lines)}
        # None: it runs; 0: all passed, 1: some failed, 5: none were this process's.
        if share.process.returncode not in (None, 0, 1, 5):
            end = "\n".join(share.log.read_text(errors="replace").splitlines()[-15:])
            trouble.append({"exit": share.process.returncode, "log": end})
    for test in known:
        # A module that was skipped, or could not be imported, has one entry for all its tests.
        module = found.get(test.partition("::")[0], {"outcome": "lost", "message": ""})
        found.setdefault(test, module | {"test": test, "seconds": 0})
    return {
        "counts": Counter(each["outcome"] for each in found.values()),
        "failed": [each for each in found.values() if each["outcome"] == "failed"],
        "skipped": [each for each in found.values() if each["outcome"] == "skipped"],
        "not_run": sorted(t for t, each in found.items() if each["outcome"] in NOT_RUN),
        "seconds": round(sum(each["seconds"] for each in found.values()), 1),
        "trouble": trouble,
    }


QUICK_TESTS, QUICK_SELECTION = "tests/ops/ema/test_ema.py", "thousand or between_elements"
NOT_RUN = ("out of time", "unfinished", "lost")


class Share:
    """A part of the tests and the process that runs them, replaced where it ends before them."""

    def __init__(
        self, command: list[str], files: list[str], environment: dict[str, str], lines: Path,
        log: Path,
    ):  # fmt: skip
        self.command = [*command, "--gpu-results", str(lines), *files]
        self.environment, self.lines, self.log = environment, lines, log
        self.starts = 0
        self.process = self._start()

    def _start(self) -> subprocess.Popen:
        self.starts += 1
        with self.log.open("a") as stream:
            return subprocess.Popen(
                self.command, cwd=ROOT, env=self.environment, stdout=stream, stderr=stream
            )

    def is_running(self) -> bool:
        """Whether there is more to wait for; starts a new process where one was lost."""
        status = self.process.poll()
        lost = status is not None and (status == LOST or status < 0)
        if lost and self.starts <= RESTARTS:
            self.process = self._start()
        return self.process.poll() is None

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def run_measurements(
    args: argparse.Namespace, results: Results, scratch: Path, seconds: float
) -> None:
    """_gpu/check_measure.py, again after errors that end its process."""
    ends = time.monotonic() + seconds
    lines, log = scratch / "measure.jsonl", scratch / "measure.log"
    command = [sys.executable, "-m", "_gpu.check_measure", "--out", str(lines)]
    command += ["--quick"] * args.quick + ["--dry-run"] * args.dry_run
    first = 0
    for _ in range(RESTARTS + 1):
        left = ends - time.monotonic()
        extra = ["--seconds", str(max(1.0, left - GRACE_S)), "--first", str(first)]
        if "ceilings" in results.meta:
            extra += ["--ceilings", json.dumps(results.meta["ceilings"])]
        seen = len(_lines(lines))
        with log.open("a") as stream:
            process = subprocess.Popen(
                command + extra, cwd=ROOT, env=_environment(args), stdout=stream, stderr=stream
            )
            while process.poll() is None and time.monotonic() < ends:
                time.sleep(0.5)
                seen = _follow(lines, seen, results)
            if process.poll() is None:
                process.kill()
            process.wait()
        _follow(lines, seen, results)
        started = [each for each in _lines(lines) if "started" in each]
        if process.returncode == 0 or time.monotonic() > ends:
            break
        if not started or started[-1]["started"] < first:
            break
        first = started[-1]["started"] + 1
    if process.returncode:
        end = "\n".join(log.read_text(errors="replace").splitlines()[-8:])
        where = started[-1]["name"] if started else "before the first comparison"
        results.missing.append(
            {"name": where, "reason": f"process ended with {process.returncode}: {end}",
             "remedy": ""}
        )  # fmt: skip


def _follow(path: Path, seen: int, results: Results) -> int:
    """Take what has been added to the file; how many lines are known then."""
    entries = _lines(path)
    for entry in entries[seen:]:
        results.take(entry)
    if len(entries) > seen:
        results.write()
    return len(entries)


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file that may be growing, or not be there yet."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def _environment(args: argparse.Namespace) -> dict[str, str]:
    """Of the child processes: they find the benchmarks and fastvlp here, and share one cache."""
    paths = [str(BENCH), str(ROOT), os.environ.get("PYTHONPATH", "")]
    # Another ptxas than that of Triton's wheel would find none of the kernels brought along.
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_PTXAS_PATH"}
    return inherited | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "TRITON_CACHE_DIR": str(args.cache),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }


def table(results: Results) -> str:
    """The short table: fastvlp's rows with the best peer and the share of the floor's speed."""
    lines = [f"{'operator, phase, dtype, sizes':<78} {'ms':>9} {'of floor':>9} {'peer/ours':>9}"]
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in results.rows:
        key = row["op"], row["phase"], row["dtype"], json.dumps(row["shape"])
        groups.setdefault(key, []).append(row)
    for (op, phase, dtype, shape), rows in groups.items():
        ours = next((row for row in rows if row["impl"] == OURS and row["ms"]), None)
        if ours is None:
            continue
        peers = [r for r in rows if r["ms"] and not r["impl"].startswith((OURS, BOUND))]
        best = min(peers, key=lambda row: row["ms"], default=None)
        sizes = " ".join(f"{key}={value}" for key, value in json.loads(shape).items())
        against = f"{best['ms'] / ours['ms']:9.2f} {best['impl']}" if best else ""
        name = f"{op} {phase} {dtype} {sizes}"
        lines.append(f"{name:<78} {ours['ms']:9.3f} {ours['share_of_floor']:9.0%} {against}")
    return "\n".join(lines)


def summary(results: Results) -> str:
    """What a person wants to know at the end."""
    meta, parts = results.meta, []
    tests = meta.get("tests", {})
    if tests:
        verb = "ran to their end, unjudged" if results.dry_run else "passed"
        counts = dict(tests["counts"])
        others = ", ".join(f"{n} {what}" for what, n in counts.items() if what != "passed")
        parts.append(f"Tests on the device: {counts.get('passed', 0)} {verb}"
                     + (f", {others}" if others else "") + ".")  # fmt: skip
        parts += [f"  FAILED {each['test']}: {each['message'].splitlines()[0][:140]}"
                  for each in tests["failed"][:LISTED] if each["message"]]  # fmt: skip
        parts += [f"  a process of the tests ended with {each['exit']}:\n{each['log']}"
                  for each in tests["trouble"][:2]]  # fmt: skip
    if results.missing:
        parts.append(f"Not measured: {len(results.missing)}, among them:")
        parts += [f"  {each['name']}: {each['reason'][:160]}" for each in results.missing[:LISTED]]
    for name, facts in meta["stages"].items():
        parts.append(f"{name}: {facts['seconds']} s {facts.get('error', '')}".rstrip())
    if "libraries" in meta:
        parts.append(f"Libraries: {meta['libraries']}.")
    if "kernels" in meta:
        kernels = meta["kernels"]
        parts.append(
            f"Kernels: {kernels['brought']} brought, {kernels['compiled_here']} compiled here."
        )
    if "ceilings" in meta:
        rates = ", ".join(f"{key} {value:,.1f}" for key, value in meta["ceilings"].items())
        parts.append(f"{meta.get('gpu')}: {rates}")
    if results.dry_run:
        parts.append("DRY RUN: nothing was executed, every time and rate below is made up.")
    return "\n".join(parts)


def check(args: argparse.Namespace) -> int:
    """Run all stages; 0 where all tests ran and none failed, and every stage ended as it should."""
    began = time.monotonic()
    results = Results(args.json, args.dry_run)
    results.meta |= {"gpu": gpu_name(), "prepared_from": check_folder.commit(ROOT)}
    args.cache = check_folder.unpack_cache(ROOT, args.cache)
    brought = check_folder.kernels_in(args.cache)
    stages = {"libraries": prepare_libraries, "tests": run_tests, "measurements": run_measurements}
    with tempfile.TemporaryDirectory() as folder:
        for name, stage in stages.items():
            left = args.seconds - (time.monotonic() - began)
            entered = time.monotonic()
            facts: dict[str, Any] = {}
            try:
                stage(args, results, Path(folder), left * SHARES[name])
            except Exception as error:  # the next stage is worth having all the same
                facts["error"] = f"{type(error).__name__}: {error}"
            facts["seconds"] = round(time.monotonic() - entered, 1)
            results.meta["stages"][name] = facts
            results.write()
    compiled = check_folder.kernels_in(args.cache) - brought
    results.meta["kernels"] = {"brought": brought, "compiled_here": compiled}
    results.meta["complete"] = True
    results.write()
    print(summary(results))
    print(table(results))
    if results.path:
        print(f"kept in {results.path}")
    bad = [facts for facts in results.meta["stages"].values() if "error" in facts]
    tests = results.meta.get("tests", {"trouble": ["the stage failed"]})
    wrong = [tests.get(kind) for kind in ("failed", "not_run", "trouble")]
    return int(bool(bad or any(wrong) or not results.rows))


def gpu_name() -> str:
    """What nvidia-smi calls the first GPU, before anything of torch is there to ask."""
    command = ("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown GPU"
    return found.stdout.strip().partition("\n")[0]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    flags = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=HelpFormatter,
    )
    flags.add_argument("--dry-run", action="store_true", help="no GPU: compile, measure nothing")
    flags.add_argument("--quick", action="store_true", help="a few tests, small sizes")
    flags.add_argument("--seconds", type=float, default=SECONDS, help="for everything")
    flags.add_argument(
        "--workers", type=int, default=min(16, os.cpu_count() or 1), help="processes of tests"
    )
    flags.add_argument("--json", type=Path, help="default: bench/results, none of a dry run")
    flags.add_argument("--cache", type=Path, help="Triton's cache (default: build/triton)")
    flags.add_argument("--prepare", type=Path, metavar="FOLDER", help="what the machine needs")
    check_folder.add_flags(flags)
    args = flags.parse_args(argv)
    if args.seconds <= 0 or args.workers < 1:
        flags.error("--seconds and --workers must be positive")
    inside = args.json and (BENCH / "results") in args.json.resolve().parents
    if args.dry_run and inside:
        flags.error("--json: the made-up times of a dry run do not belong in bench/results")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.prepare:
        return check_folder.prepare(args, ROOT)
    return check(args)


if __name__ == "__main__":
    sys.exit(main())
