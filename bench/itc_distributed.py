"""The contrastive loss over a global batch spread on several ranks, forward and backward.

    python bench/itc_distributed.py --world-sizes 1,2,4 --batch 4096 --dtype fp32,bf16

Spawns the ranks on this machine and compares fastvlp with open_clip's ClipLoss(local_loss,
gather_with_grad), the setting large runs train with: time of the slowest rank, ranks
starting each call together; bytes each rank sends, counted (distributed_traffic.py); the
largest extra peak memory of a rank; FLOPs of the matmuls; error against the float64 loss
of the whole batch on one process. `--project` adds what the counts mean for more GPUs.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from _harness import measure, memory, ranks, report
from _harness.measure import DTYPES, OURS, Implementation, Missing, Settings, positives
from _harness.run import Run
from _harness.timing import status
from baselines.contrastive import features, softmax
from baselines.contrastive.distributed import PEER, implementations
from baselines.contrastive.projection import TITLE, CountedMatmuls, Rates, print_projection, project
from baselines.contrastive.softmax import Inputs
from baselines.contrastive.traffic import RULE, Traffic, loopback_bytes

from fastvlp.distributed import all_gather_rows

OP = "contrastive_distributed"
PACKAGES = ("open_clip_torch", "numpy")


@dataclass(frozen=True)
class Job:
    """One comparison: what all ranks compute."""

    settings: Settings
    dtype: str
    world_size: int
    batch: int  # pairs of each rank
    dim: int
    scale: float
    error_batch: int  # pairs of each rank where the error is measured

    @property
    def shape(self) -> dict[str, int]:
        return {"world_size": self.world_size, "batch": self.batch, "dim": self.dim}


def inputs(job: Job, batch: int) -> Inputs:
    """This rank's pairs of a global batch; the same at each call, others on other ranks."""
    everything = features.pairs(features.RANDOM, batch * job.world_size, job.dim)
    mine = slice(dist.get_rank() * batch, (dist.get_rank() + 1) * batch)
    # Copies, so that the global batch is freed and not taken for an input.
    image, text = (
        side[mine].to(job.settings.device, DTYPES[job.dtype], copy=True) for side in everything
    )
    return Inputs(image, text, torch.tensor(job.scale, device=job.settings.device))


def _together(tensor: torch.Tensor) -> torch.Tensor:
    parts = tensor.new_empty(dist.get_world_size() * len(tensor), *tensor.shape[1:])
    all_gather_rows(parts, tensor.contiguous())
    return parts


def errors(implementation: Implementation, job: Job) -> dict[str, float]:
    """Relative errors of the whole batch's loss and gradients against one float64 process.

    Loss and gradients are averaged over the ranks as DDP averages them: a rank's gradient
    w.r.t. its own features then is W times that of the global mean, the scale's its plain mean.
    """
    own = inputs(job, job.error_batch)
    image, text = _together(own.image), _together(own.text)
    truth = dict(softmax.float64_reference(Inputs(image, text, own.scale)))
    for name in ("d_image", "d_text"):
        truth[name] = truth[name] * job.world_size
    found = {}
    for name, value in implementation.make(own)().items():
        whole = _together(value) if value.dim() else _together(value.reshape(1)).double().mean()
        found[name] = measure.relative_error(whole, truth[name])
    return found


def measure_on_ranks(job: Job, runners: Sequence[Implementation]) -> list[dict[str, Any]]:
    """On every rank of a group: the rows of a comparison, the same on each, without memory."""
    label = f"{OP} {job.dtype} " + " ".join(f"{key}={value}" for key, value in job.shape.items())
    with status(f"{label}: errors at {job.error_batch} pairs a rank"):
        wrong = {each.name: errors(each, job) for each in runners}
    own = inputs(job, job.batch)
    calls = {each.name: each.make(own) for each in runners}
    settings = job.settings
    times = ranks.alternate(
        calls,
        device=settings.device,
        min_rounds=settings.min_rounds,
        max_rounds=settings.max_rounds,
        budget_s=settings.budget_s,
        label=label,
    )
    rows = []
    for each in runners:
        with status(f"{label}: counting {each.name}"):
            counts = count(calls[each.name], settings.device)
        row = measure.row(
            OP,
            each,
            job.dtype,
            job.shape,
            "fwd+bwd",
            times[each.name],
            None,
            wrong[each.name],
            softmax.JUDGED,
        )
        rows.append({**row, **counts})
    return rows


def count(call: Callable[[], Any], device: str) -> dict[str, Any]:
    """Bytes and FLOPs of one call on the rank that has most of them."""
    before, after = None, None
    dist.barrier()
    if dist.get_rank() == 0:
        before = loopback_bytes()
    dist.barrier()
    with Traffic() as traffic:
        call()
    dist.barrier()
    if dist.get_rank() == 0:
        after = loopback_bytes()
    dist.barrier()
    with CountedMatmuls() as matmuls:
        call()
    most = ranks.slowest([float(traffic.bytes_sent), matmuls.flops], device)
    seen = None
    if device == "cpu" and before is not None and after is not None:
        seen = (after - before) / dist.get_world_size()
    return {
        "bytes_sent": int(most[0]),
        "flops": most[1],
        "exchanges": dict(traffic.calls),
        "loopback_bytes": seen,
    }


def peak(job: Job, implementation: Implementation) -> memory.Probe:
    """On every rank of a new group: the extra peak of one call, inputs not counted."""
    build, tiny = functools.partial(inputs, job, job.batch), functools.partial(inputs, job, 64)
    if job.settings.device == "cuda":
        return memory._cuda_peak(implementation.make, build, tiny, 0)
    if not memory._CLEAR.exists():
        return memory.Probe(None, failure="needs Linux with /proc/self/clear_refs")
    return memory._resident_peak(implementation.make, build, tiny, False, 0)


def compare(job: Job) -> tuple[list[dict[str, Any]], list[Missing]]:
    """The rows of one comparison, and what could not be measured."""
    runners, missing = implementations(job.dtype, job.world_size, job.settings.device)
    group = functools.partial(
        ranks.launch, job.world_size, device=job.settings.device, threads=job.settings.threads
    )
    rows = group(measure_on_ranks, job, runners, timeout_s=3600.0)[0]
    for row, runner in zip(rows, runners, strict=True):
        with status(f"{OP} {job.dtype} W={job.world_size}: peak memory of {runner.name}"):
            probes = group(peak, job, runner)
        failures = [probe.failure for probe in probes if probe.failure]
        if failures:
            missing.append(Missing(f"peak memory of {runner.name}", failures[0]))
        else:
            row["peak_mb"] = max(probe.peak_mb for probe in probes)
    return rows, missing


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    flags = measure.parser(__doc__)
    flags.set_defaults(threads=1)
    flags.add_argument(
        "--world-sizes", type=positives, metavar="W,...", help="ranks (default 1,2,4; 2 if quick)"
    )
    flags.add_argument("--batch", type=int, help="pairs of each rank (default 4096; 512 if quick)")
    flags.add_argument("--dim", type=int, default=512, help="width of the features")
    measure.add_dtypes(flags)
    flags.add_argument("--scale", type=float, default=100.0, help="exp(logit_scale)")
    flags.add_argument(
        "--error-batch",
        type=int,
        default=256,
        help="pairs of each rank where errors are measured, --batch at most",
    )
    flags.add_argument(
        "--project",
        action="store_true",
        help="also print a projection to more GPUs; needs two W above 1",
    )
    flags.add_argument("--project-to", type=positives, default=[8, 64, 512], metavar="W,...")
    flags.add_argument(
        "--link-gbs",
        type=float,
        default=Rates.link_gbs,
        help="of the projection: 10^9 bytes/s a GPU sends",
    )
    flags.add_argument(
        "--matrix-tflops",
        type=float,
        default=Rates.matrix_tflops,
        help="of the projection: 10^12 FLOP/s that matmuls sustain",
    )
    args = flags.parse_args(argv)
    args.world_sizes = args.world_sizes or ([2] if args.quick else [1, 2, 4])
    args.batch = args.batch or (512 if args.quick else 4096)
    if min(args.batch, args.dim, args.error_batch) < 1 or not 0 < args.scale < float("inf"):
        flags.error("--batch, --dim, --error-batch and --scale must be positive")
    if not (args.link_gbs > 0 and args.matrix_tflops > 0):
        flags.error("--link-gbs and --matrix-tflops must be positive")
    if args.project and len({w for w in args.world_sizes if w > 1}) < 2:
        flags.error("--project needs two different --world-sizes above 1, as in 2,4")
    gpus = torch.cuda.device_count()
    if args.device == "cuda" and max(args.world_sizes) > gpus:
        flags.error(f"--world-sizes: {max(args.world_sizes)} ranks need as many GPUs, found {gpus}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    rates = Rates(args.matrix_tflops, args.link_gbs)
    facts = {
        "features": features.RANDOM.about,
        "scale": args.scale,
        "backend": "nccl" if args.device == "cuda" else "gloo",
        "error_batch": args.error_batch,
        "bytes_sent": RULE,
        "projection": {"note": TITLE, **vars(rates), "rows": []},
    }
    columns = ("softmax", "matmuls", "MB sent", "of its bytes")
    with Ranks(
        args,
        PACKAGES,
        axis=("world_size", "ranks W"),
        columns=columns,
        legend=LEGEND,
        summary=summary,
        facts=facts,
    ) as run:
        warn_of_shared_cores(args, run)
        for dtype, world_size in itertools.product(args.dtype, args.world_sizes):
            job = Job(
                run.settings,
                dtype,
                world_size,
                args.batch,
                args.dim,
                args.scale,
                min(args.error_batch, args.batch),
            )
            run.add(*compare(job))
        if args.project:
            projected = project(run.rows, rates, args.project_to)
            run.facts["projection"]["rows"] = projected
            print_projection(projected, rates)


LEGEND = (
    f"MB sent: {RULE}. 'of its bytes': as a share of {PEER}'s. Matmuls: 1 is this rank's "
    "rows against all columns. Time and memory: of the slowest and the largest rank."
)


def warn_of_shared_cores(args: argparse.Namespace, run: Run) -> None:
    most, cores = max(args.world_sizes), run.meta["cores"]
    if args.device == "cpu" and most * run.settings.threads > cores:
        run.print(
            f"Mind: {most} ranks with {run.settings.threads} threads each share {cores} cores."
        )


class Ranks(Run):
    """Shows what each rank sends and computes."""

    def show(self, rows: Sequence[Mapping[str, Any]]) -> None:
        super().show([_shown(row, rows) for row in rows])


def _peer(rows: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """open_clip's fastest row with an fp32 softmax in the comparison `row` belongs to."""
    key = report.group_key(row)
    found = [
        each
        for each in rows
        if report.group_key(each) == key
        and each["impl"].startswith(PEER)
        and each["softmax"] == "fp32"
    ]
    return min(found, key=lambda each: each["ms"], default=None)


def _shown(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    shape, peer = row["shape"], _peer(rows, row)
    one = 2 * shape["batch"] ** 2 * shape["world_size"] * shape["dim"]
    share = row["bytes_sent"] / peer["bytes_sent"] if peer and peer["bytes_sent"] else None
    return {
        **row,
        "matmuls": f"{row['flops'] / one:.2f}",
        "MB sent": f"{row['bytes_sent'] / 1e6:.2f}",
        "of its bytes": "" if share is None else f"{share:.2f}",
    }


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each comparison: every schedule of ours against open_clip."""
    lines = []
    for group in report.groups(rows):
        first, peer = group[0], _peer(group, group[0])
        parts = []
        for row in group:
            if peer and row["impl"].startswith(OURS):
                part = f"{row['impl']} {peer['ms'] / row['ms']:.2f}x as fast"
                if peer["bytes_sent"]:
                    part += f" with {row['bytes_sent'] / peer['bytes_sent']:.2f} of the bytes"
                parts.append(part)
        if parts:
            lines.append(
                f"{first['dtype']}, W={first['shape']['world_size']}, against "
                f"{peer['impl']} ({peer['ms']:.0f} ms): {'; '.join(parts)}."
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
