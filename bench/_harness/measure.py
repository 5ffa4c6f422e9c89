"""Fair comparisons of several implementations of one op, in one process and one run.

The implementations alternate: every round calls each of them once, in an order of its own, so that
a machine that slows down or heats up, and what one leaves in the caches, slows all of them
alike. Reported times are medians with their quartiles. Every script in this folder builds
its implementations, hands them to `compare`, and gives the rows to a `run.Run`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from _harness import memory
from _harness.help import HelpFormatter
from _harness.timing import Call, Neighbours, alternate, status

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OURS, BOUND = "fastvlp", "floor"


@dataclass(frozen=True)
class Implementation:
    """One implementation under a name.

    `make(inputs)` prepares everything that is not to be timed and returns the call that
    is; the call returns its results by name (compared with the reference) or None.
    `make` runs in a child process as well, so it must be picklable: a module-level
    function or a functools.partial of one.
    """

    name: str
    make: Callable[[Any], Call]
    # A bound (a matmul, a memory copy) is only timed: it computes no result.
    bound: bool = False
    # What it is, where the name does not say it; printed under its table. A bound must have one.
    note: str = ""
    # Compilation at the measured shape must not be mistaken for memory of the op.
    compiled: bool = False
    # Further fields of its rows, e.g. the precision of a softmax.
    extra: Mapping[str, Any] = field(default_factory=dict)
    # (inputs, results) -> results laid out as the reference's; not part of the timed call.
    unify: Callable[[Any, Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]] | None = None

    def __post_init__(self) -> None:
        if self.bound and not self.note:
            raise ValueError(f"bound {self.name!r}: expected a note that says what it computes")


@dataclass(frozen=True)
class Settings:
    """How long and where to measure; made from the command line by `settings_from`."""

    device: str = "cpu"
    threads: int = 1
    quick: bool = False
    warmups: int = 2
    min_rounds: int = 7
    max_rounds: int = 30
    # Seconds of alternation per comparison, once the least number of rounds is done.
    budget_s: float = 20.0
    # On a GPU: whether each call finds L2 overwritten.
    cold: bool = True


@dataclass(frozen=True)
class Missing:
    """Something a run would have used, why it could not, and how to get it."""

    name: str
    reason: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}" + (f" ({self.remedy})" if self.remedy else "")


def choices(*allowed: str) -> Callable[[str], list[str]]:
    """The type of a flag that takes a comma-separated choice among `allowed`."""

    def parse(text: str) -> list[str]:
        found = [part.strip() for part in text.split(",") if part.strip()]
        if not found or set(found) - set(allowed):
            raise argparse.ArgumentTypeError(f"{text!r}: choose among {', '.join(allowed)}")
        return found

    parse.takes_several = True
    return parse


def integers(least: int, may_be_empty: bool = False) -> Callable[[str], list[int]]:
    """The type of a flag that takes comma-separated integers of at least `least`."""

    def parse(text: str) -> list[int]:
        parts = [part.strip() for part in text.split(",") if part.strip()]
        try:
            found = [int(part) for part in parts]
        except ValueError:
            found = [least - 1]
        if any(number < least for number in found) or not (found or may_be_empty):
            raise argparse.ArgumentTypeError(
                f"{text!r}: expected integers of at least {least}, as in {least},{2 * least}"
            )
        return found

    parse.takes_several = True
    return parse


dtypes, positives = choices(*DTYPES), integers(1)


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The flags every benchmark has, described by the first line of its docstring."""
    flags = argparse.ArgumentParser(
        description=(doc or "").partition("\n")[0],
        formatter_class=HelpFormatter,
    )
    flags.add_argument("--quick", action="store_true", help="small sizes, under 40 seconds")
    flags.add_argument("--json", type=Path, metavar="PATH", help="write meta and rows here")
    flags.add_argument("--plot", type=Path, metavar="PATH", help="draw time and memory (.png)")
    flags.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run")
    flags.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's choice")
    flags.add_argument(
        "--warm-cache", action="store_true", help="leave a GPU's L2 cache as calls leave it"
    )
    flags.add_argument("--rounds", type=int, default=0, help="least rounds; 0: 7, or 3 if quick")
    flags.add_argument(
        "--seconds", type=float, default=0.0, metavar="S",
        help="of each comparison, after the least rounds; 0: 20, or 2 if quick",
    )  # fmt: skip
    return flags


def add_dtypes(flags: argparse.ArgumentParser) -> None:
    """The flag of benchmarks that take several dtypes."""
    flags.add_argument("--dtype", type=dtypes, default=["fp32", "bf16"], help="fp32, bf16, fp16")


def add_omissions(flags: argparse.ArgumentParser, *, compiled: bool) -> None:
    """The flags that leave out what takes long: `run.Run` reads them."""
    if compiled:
        flags.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    flags.add_argument("--no-memory", action="store_true", help="leave out the peak memory")


def settings_from(args: argparse.Namespace) -> Settings:
    """Settings from parsed flags; also sets the number of threads of this process."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: this torch sees no CUDA device; use --device cpu")
    if min(args.threads, args.rounds, args.seconds) < 0:
        raise SystemExit("--threads, --rounds and --seconds must be positive, or 0 for the default")
    if args.threads:
        torch.set_num_threads(args.threads)
    threads = torch.get_num_threads()
    on_gpu = args.device == "cuda"
    rounds = args.rounds or (3 if args.quick else 7)
    seconds = args.seconds or (2.0 if args.quick else 20.0)
    cold = not args.warm_cache
    if args.quick:
        return Settings(args.device, threads, True, 2, rounds, max(rounds, 5), seconds, cold)
    warmups, most = (5, 100) if on_gpu else (2, 30)
    return Settings(args.device, threads, False, warmups, rounds, max(rounds, most), seconds, cold)


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """‖value − reference‖ / ‖reference‖ in float64 (Frobenius), or ‖value‖ if that is 0."""
    if value.shape != reference.shape:
        raise ValueError(
            f"a result has shape {tuple(value.shape)}, its reference {tuple(reference.shape)}"
        )
    truth = reference.double()
    size = torch.linalg.vector_norm(truth)
    distance = torch.linalg.vector_norm(value.detach().to(truth) - truth)
    return float(distance / size if size > 0 else distance)


@dataclass
class _Prepared:
    implementation: Implementation
    call: Call
    errors: dict[str, float]


def _prepare(
    implementation: Implementation,
    inputs: Any,
    reference: Mapping[str, torch.Tensor] | None,
    settings: Settings,
) -> _Prepared:
    call = implementation.make(inputs)
    result = call()
    errors = {}
    if reference is not None and not implementation.bound:
        if implementation.unify and result is not None:
            result = implementation.unify(inputs, result)
        if result is None or set(result) != set(reference):
            raise ValueError(
                f"implementation {implementation.name!r} must return {sorted(reference)}, "
                f"it returned {sorted(result) if result else None}"
            )
        errors = {name: relative_error(result[name], reference[name]) for name in reference}
    del result
    for _ in range(settings.warmups - 1):
        call()
    return _Prepared(implementation, call, errors)


def compare(
    op: str,
    implementations: Sequence[Implementation],
    build: Callable[[], Any],
    tiny: Callable[[], Any],
    settings: Settings,
    *,
    dtype: str,
    shape: Mapping[str, int],
    phase: str = "fwd+bwd",
    reference: Callable[[Any], Mapping[str, torch.Tensor]] | None = None,
    judged: Sequence[str] | None = None,
    measure_memory: bool = True,
    warm_memory: bool = False,
) -> tuple[list[dict[str, Any]], list[Missing]]:
    """Time, extra peak memory and error of every implementation on the inputs `build()` makes.

    `tiny()` makes small inputs of the same kind, which warm up the memory probe. `build`
    and `tiny` must be picklable and give the same inputs each time. `error` in a row is
    the largest relative error over the results named in `judged` (default: all). `warm_memory`
    measures the memory of a second call, for ops whose first one makes lasting state.

    Returns the rows, and which implementations failed and why. A failure of ours raises.
    """
    inputs = build()
    prepared: list[_Prepared] = []
    missing: list[Missing] = []
    label = f"{op} {dtype} " + " ".join(f"{key}={value}" for key, value in shape.items())
    with status(f"{label}: float64 reference"):
        truth = reference(inputs) if reference else None
    for implementation in implementations:
        with status(f"{label}: warming up {implementation.name}"):
            try:
                prepared.append(_prepare(implementation, inputs, truth, settings))
            except Exception as error:
                if implementation.name == OURS:
                    raise
                summary = (str(error).strip().splitlines() or [""])[0][:200]
                missing.append(Missing(implementation.name, f"{type(error).__name__}: {summary}"))
    launches: dict[str, list[float]] = {}
    with Neighbours() as neighbours:
        times = alternate(
            {each.implementation.name: each.call for each in prepared},
            device=settings.device,
            min_rounds=settings.min_rounds,
            max_rounds=settings.max_rounds,
            budget_s=settings.budget_s,
            label=label,
            cold=settings.cold,
            launches=launches,
        )
    prepared_implementations = [(each.implementation, each.errors) for each in prepared]
    # Free what the timed calls hold before memory is measured.
    del prepared, inputs, truth
    rows = []
    for implementation, errors in prepared_implementations:
        peak = None
        if implementation.compiled and settings.quick:
            # Compiling once more, in another process, takes longer than all the rest.
            missing.append(Missing(f"peak memory of {implementation.name}", "left out by --quick"))
        elif measure_memory and not implementation.bound:
            with status(f"{label}: peak memory of {implementation.name}"):
                probe = memory.extra_peak(
                    implementation.make,
                    build,
                    tiny,
                    threads=settings.threads,
                    device=settings.device,
                    warm_full=implementation.compiled or warm_memory,
                )
            peak = probe.peak_mb
            if probe.failure:
                missing.append(Missing(f"peak memory of {implementation.name}", probe.failure))
        rows.append(
            row(
                op,
                implementation,
                dtype,
                shape,
                phase,
                times[implementation.name],
                peak,
                errors,
                judged,
            )
            | {"neighbours": neighbours.share}
            | launch_field(launches.get(implementation.name))
        )
    return rows, missing


def launch_field(times: Sequence[float] | None) -> dict[str, float]:
    """The median of the host's milliseconds to launch a call; nothing where nobody took them."""
    return {"launch_ms": float(np.median(times))} if times else {}


def row(
    op: str,
    implementation: Implementation,
    dtype: str,
    shape: Mapping[str, int],
    phase: str,
    times: Sequence[float],
    peak_mb: float | None,
    errors: Mapping[str, float] | None = None,
    judged: Sequence[str] | None = None,
) -> dict[str, Any]:
    """One line of the JSON: median and quartiles in ms, MB (10^6 bytes), relative error."""
    low, middle, high = np.percentile(times, (25, 50, 75)) if len(times) else (None,) * 3
    errors = dict(errors or {})
    kept = [errors[name] for name in (judged or errors) if name in errors]
    return {
        "op": op,
        "impl": implementation.name,
        "dtype": dtype,
        "shape": dict(shape),
        "phase": phase,
        "ms": None if middle is None else float(middle),
        "peak_mb": peak_mb,
        # max() would pass over a NaN that is not the first.
        "error": float(np.max(kept)) if kept else None,
        "ms_q1": None if low is None else float(low),
        "ms_q3": None if high is None else float(high),
        "rounds": len(times),
        "errors": errors,
        **implementation.extra,
        **({"note": implementation.note} if implementation.note else {}),
    }
