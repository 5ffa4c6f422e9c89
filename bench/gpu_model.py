"""A performance model's milliseconds of each op on GPUs that are not there: ours and its peers.

    python bench/gpu_model.py --chip h100,a100 --json model.json

Nothing here is a time. Kernels are compiled for the GPU, their PTX is executed on the CPU and
counted, and the counts are turned into a bound by the chip's rates (_gpu/chips.py, _gpu/bound.py).
Operations of torch and matmuls of vendors' libraries are bounded by their bytes and by the share
of peak that is published; the floor has the chip's peak, which our own kernels may reach. --sanity
compares the model with published times of three kernels.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Mapping, Sequence

from _gpu import sanity
from _gpu.bound import Bound, Executed, bounds, floor_bound, torch_bound
from _gpu.chips import CHIPS, Chip
from _gpu.launches import Event, record, record_eager
from _gpu.model_case import Case, ModelledImplementation, installed
from _gpu.model_cases import cases
from _harness import measure
from _harness.measure import BOUND, OURS, Implementation, Missing
from _harness.run import Run
from ptx_machine.cuda_library import Missing as NoCompiler
from ptx_machine.errors import ProgramError, UnknownForm
from triton.runtime.errors import OutOfResources

LEGEND = "Every ms is a model's bound, not a time; nothing ran on a GPU."
# What an implementation that cannot be modelled raises: a tile that does not fit or changes with
# the size, PTX that the machine does not know or a program that it refuses, no nvcc.
UNMODELLED = (
    ValueError, NotImplementedError, UnknownForm, ProgramError, OutOfResources, NoCompiler,
)  # fmt: skip
PEERS = ("inf-cl", "memeff", "liger-kernel", "siglip-kernel", "triton")


class Machine:
    """Executes implementations once for each compute capability, whatever the size and chip."""

    def __init__(self) -> None:
        self._executed: dict[tuple, Executed] = {}
        self._true: dict[tuple, list[Event]] = {}

    def bounds(self, chip: Chip, each: ModelledImplementation, size: int) -> list[Bound]:
        """The bounds of everything that an implementation launches at a size."""
        around = [torch_bound(chip, op) for op in each.around]
        key = (each.name, each.run.func, each.run.args, chip.executes, size)
        if key not in self._true:
            self._true[key] = (
                record_eager(lambda: each.run(size))
                if each.eager
                else record(each.run(size), chip.executes, execute=False, native=each.native)
            )
        true = self._true[key]
        if each.eager:
            return [*around, *(torch_bound(chip, op) for op in true)]
        return [*around, *bounds(chip, self._execute(chip, each), true, size)]

    def _execute(self, chip: Chip, each: ModelledImplementation) -> Executed:
        key = (each.name, each.run.func, each.run.args, chip.executes)
        if key not in self._executed:
            events = tuple(
                record(
                    each.run(n), chip.executes, execute=True,
                    multiprocessors=each.multiprocessors(n) if each.multiprocessors else None,
                    native=each.native,
                )
                for n in each.sizes
            )  # fmt: skip
            self._executed[key] = Executed(each.sizes, events)
        return self._executed[key]


def compare(
    machine: Machine, chip: Chip, case: Case
) -> tuple[list[dict[str, object]], list[Missing]]:
    """Rows of one case on a chip, and what the machine cannot run, with the reason."""
    rows, missing = [], [Missing(name, reason) for name, reason in case.missing]
    for each in case.implementations:
        if each.needs and not installed(each.needs):
            remedy = "pip install -e '.[gpu-model]'"
            missing.append(Missing(each.name, "not installed", remedy))
            continue
        try:
            found = machine.bounds(chip, each, case.size)
        except UNMODELLED as error:
            first = (str(error).strip().splitlines() or [""])[0][:200]
            missing.append(Missing(each.name, f"{type(error).__name__}: {first}"))
            continue
        rows.append(_row(case, chip, each.name, found))
    floor = floor_bound(chip, case.floor)
    rows.append(_row(case, chip, BOUND, [floor], note=case.note))
    return rows, missing


def _row(case: Case, chip: Chip, name: str, found: Sequence[Bound], note: str = "") -> dict:
    total = math.fsum(bound.ms for bound in found)
    by_kernel: Counter = Counter()
    for bound in found:
        by_kernel[bound.name] += bound.ms
    slowest = max(found, key=lambda bound: bound.ms)
    extra = {
        "chip": chip.name,
        "µs": f"{1e3 * total:,.0f}",
        "launches": len(found),
        "limited_by": slowest.limited_by,
        "parts": {kernel: round(ms, 6) for kernel, ms in by_kernel.most_common(6)},
    }
    implementation = Implementation(name, None, bound=name == BOUND, note=note, extra=extra)
    phase = f"{case.phase} (model of {chip.name})"
    row = measure.row(case.op, implementation, case.dtype, case.shape, phase, [total], None)
    # Nothing was measured: no rounds, and no quartiles of them.
    return {**row, "rounds": 0, "ms_q1": None, "ms_q3": None}


def summary(rows: Sequence[Mapping]) -> str:
    """Where the model sees ours against the floor and the best peer."""
    lines = ["By the model, not by measurement:"]
    groups: dict[tuple, list[Mapping]] = {}
    for row in rows:
        key = (row["op"], tuple(row["shape"].items()), row["phase"])
        groups.setdefault(key, []).append(row)
    for (op, shape, _), group in groups.items():
        own = next((row for row in group if row["impl"] == OURS), None)
        if own is None:
            continue
        floor = next(row for row in group if row["impl"].startswith(BOUND))
        text = f"{op} {' '.join(f'{k}={v}' for k, v in shape)}, {own['chip']}: {own['ms']:.3f} ms, "
        text += f"{floor['ms'] / own['ms']:.0%} of the floor's speed"
        peers = [row for row in group if row not in (own, floor)]
        if peers:
            best = min(peers, key=lambda row: row["ms"])
            text += f", {best['ms'] / own['ms']:.2f}x as fast as {best['impl']}"
        lines.append(text)
    return "\n" + "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    flags = measure.parser(__doc__)
    flags.add_argument(
        "--chip", type=measure.choices(*CHIPS), default=None, metavar="NAMES",
        help=f"comma-separated, of {', '.join(CHIPS)}; default h100,a100,h200,b200, quick: h100",
    )  # fmt: skip
    flags.add_argument("--op", default="", help="only this op")
    flags.add_argument("--sanity", action="store_true", help="also compare with published times")
    args = flags.parse_args(argv)
    args.chip = args.chip or (["h100"] if args.quick else ["h100", "a100", "h200", "b200"])
    if args.device != "cpu":
        flags.error("--device cuda: this is a model, which runs on the CPU only")
    if args.plot:
        flags.error("--plot: this benchmark draws nothing; --json keeps its numbers")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    known = [case for case in cases(args.quick) if not args.op or case.op == args.op]
    if not known:
        names = sorted({case.op for case in cases(args.quick)})
        raise SystemExit(f"--op {args.op}: choose among {', '.join(names)}")
    facts = {
        "model": "ms is the bound of a performance model from counts of executed PTX, not a time",
        "chips": {name: vars(CHIPS[name]) for name in args.chip},
    }
    run = Run(
        args,
        PEERS,
        columns=("µs", "launches", "limited_by"),
        legend=LEGEND,
        summary=summary,
        facts=facts,
    )
    with run:
        machine = Machine()
        for case in known:
            for name in args.chip:
                run.add(*compare(machine, CHIPS[name], case))
        if args.sanity:
            show_sanity(run, args.quick)


def show_sanity(run: Run, quick: bool) -> None:
    found = sanity.comparisons(quick)
    run.facts["sanity"] = [
        {**vars(each), "rank_of_times": each.rank_of_times, "rank_of_rates": each.rank_of_rates}
        for each in found
    ]
    for each in found:
        run.print(sanity.describe(each))


if __name__ == "__main__":
    main()
