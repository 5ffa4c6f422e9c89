"""What the contrastive loss would take on more GPUs: a projection, not a measurement.

From two things that are counted, not estimated, on a few ranks with B pairs each:

- FLOPs of the matmuls of one rank, forward and backward, of the form f + g W. Of fastvlp
  not the counted ones, where a few ranks' logits fit into the workspace of a CPU and make 3
  matmuls enough, but 4 matmuls, 8 B (B W) D: on a GPU, and on more ranks, logits are not kept.
- bytes sent by one rank. With B fixed every exchange of the loss is of the form p + q W (an
  all-gather sends W-1 shards, a ring W-2 or W-1).

Both lines go through the counts at two or more numbers of ranks W > 1.

and from two rates that are given, R FLOP/s of matmuls and L bytes/s of the slowest link of a
GPU in one direction:

    compute  = (f + g W) / R
    transfer = (p + q W) / L
    step, nothing overlapped    = compute + transfer
    step, perfectly overlapped  = max(compute, transfer)

Left out: passes over the logits outside matmuls (an eager loss makes several over its
B x (B W) matrices), latency of messages, and faster links inside a node. All three favour the
implementations that make more passes and send more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from _harness.measure import OURS
from _harness.table import Column, print_grid

from baselines.contrastive.traffic import Listener

TITLE = "PROJECTION, not a measurement"


@dataclass(frozen=True)
class Rates:
    """matrix_tflops: 10^12 FLOP/s of matmuls; link_gbs: 10^9 bytes/s per GPU, one way."""

    matrix_tflops: float = 400.0
    link_gbs: float = 50.0


# A pass that keeps some of its logits, and one that computes the others again.
_FORWARD = ("contrastive_statistics", "contrastive_loss")
_BACKWARD = ("contrastive_gradients", "contrastive_loss_gradients")


class CountedMatmuls:
    """FLOPs of the matmuls made while open, a matmul of MxK and KxN being 2 M N K."""

    def __init__(self) -> None:
        self.flops = 0.0
        self._listeners = (
            Listener("aten", ("mm", "addmm", "bmm", "baddbmm"), self._of_torch),
            Listener("fastvlp", (*_FORWARD, *_BACKWARD), self._own),
        )

    def __enter__(self) -> CountedMatmuls:
        for listener in self._listeners:
            listener.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        for listener in self._listeners:
            listener.__exit__()

    def _of_torch(self, name: str, arguments: Mapping[str, Any]) -> None:
        names = {"addmm": ("mat1", "mat2"), "baddbmm": ("batch1", "batch2")}
        left, right = (arguments[each] for each in names.get(name, ("self", "mat2")))
        self.flops += 2 * left.numel() * right.shape[-1]

    def _own(self, name: str, arguments: Mapping[str, Any]) -> None:
        x, y = arguments["x"], arguments["y"]
        matmuls = 1.0
        if name in _BACKWARD:
            # Two for the gradients, and the logits again where they were not kept.
            rows = arguments["keep_blocks"] * arguments["block_rows"]
            kept = min(rows, len(x)) / len(x) if arguments["kept"].numel() else 0.0
            matmuls = 3.0 - kept
        self.flops += matmuls * 2 * len(x) * len(y) * x.shape[1]


def project(
    rows: Sequence[Mapping[str, Any]], rates: Rates, world_sizes: Sequence[int] = (8, 64, 512)
) -> list[dict[str, Any]]:
    """One entry for each implementation, dtype and number of GPUs, times in ms.

    rows: of one run, with `flops`, `bytes_sent` and shape {world_size, batch, dim}; counts of
    one rank are not used, those of fewer than two numbers of ranks beyond it not enough.
    """
    counted: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["shape"]["world_size"] > 1:
            counted.setdefault((row["dtype"], row["impl"]), []).append(row)
    found = []
    for (dtype, impl), group in counted.items():
        shape = group[0]["shape"]
        ranks = [row["shape"]["world_size"] for row in group]
        if len(set(ranks)) < 2:
            raise ValueError(f"{impl} {dtype}: needs counts at two numbers of ranks, got {ranks}")
        flops_line, bytes_line = (
            np.polyfit(ranks, [row[key] for row in group], 1) for key in ("flops", "bytes_sent")
        )
        for world_size in world_sizes:
            flops = float(np.polyval(flops_line, world_size))
            if impl.startswith(OURS):
                flops = 8.0 * shape["batch"] ** 2 * world_size * shape["dim"]
            sent = float(np.polyval(bytes_line, world_size))
            compute = flops / (rates.matrix_tflops * 1e12) * 1e3
            transfer = sent / (rates.link_gbs * 1e9) * 1e3
            found.append(
                {
                    "kind": "projection",
                    "impl": impl,
                    "dtype": dtype,
                    "world_size": world_size,
                    "batch": shape["batch"],
                    "flops": flops,
                    "bytes_sent": sent,
                    "compute_ms": compute,
                    "transfer_ms": transfer,
                    "exposed_ms": compute + transfer,
                    "overlapped_ms": max(compute, transfer),
                }
            )
    return found


def print_projection(entries: Sequence[Mapping[str, Any]], rates: Rates) -> None:
    """One table for each dtype, on standard output."""
    for dtype in dict.fromkeys(entry["dtype"] for entry in entries):
        group = sorted(
            (entry for entry in entries if entry["dtype"] == dtype),
            key=lambda each: each["world_size"],
        )
        columns = [
            Column("GPUs", [str(each["world_size"]) for each in group]),
            Column("GFLOP", [f"{each['flops'] / 1e9:,.0f}" for each in group]),
            Column("MB sent", [f"{each['bytes_sent'] / 1e6:,.0f}" for each in group]),
        ]
        for heading, key in (
            ("compute ms", "compute_ms"),
            ("transfer ms", "transfer_ms"),
            ("ms, no overlap", "exposed_ms"),
            ("ms, full overlap", "overlapped_ms"),
        ):
            columns.append(Column(heading, [f"{each[key]:,.2f}" for each in group]))
        print_grid(
            f"{TITLE}: counted bytes and FLOPs of {dtype} ({OURS}: 4 matmuls), "
            f"{group[0]['batch']:,} pairs per GPU, at "
            f"{rates.matrix_tflops:g} TFLOP/s and {rates.link_gbs:g} GB/s per GPU",
            Column("implementation", [each["impl"] for each in group]),
            columns,
        )
