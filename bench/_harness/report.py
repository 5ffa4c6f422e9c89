"""What a benchmark leaves behind: the machine it ran on, JSON, and a plot."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from _harness.measure import BOUND, OURS, Settings

ROOT = Path(__file__).resolve().parents[2]
# The features that decide which matmuls a CPU has.
_CPU_FEATURES = (
    "avx2",
    "fma",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "amx_tile",
    "amx_bf16",
    "amx_fp16",
    "asimd",
    "sve",
    "bf16",
)

# Okabe and Ito's palette without our vermilion: colour-blind readers can tell it apart.
_PALETTE = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#8C6D31",
    "#7F7F7F",
    "#5B3FA0",
    "#B0C400",
)


def meta(settings: Settings, packages: Sequence[str]) -> dict[str, Any]:
    """The circumstances of a run: machine, versions, and threads."""
    model, features = _cpu()
    facts: dict[str, Any] = {
        "command": _command(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": model,
        "cpu_features": features,
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_gb": _memory_gb(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "device": settings.device,
        "threads": settings.threads,
        "quick": settings.quick,
        "git": _git_commit(),
        "versions": {name: version(name) for name in ("torch", "fastvlp", *packages)},
        "units": {
            "ms": "milliseconds, median",
            "peak_mb": "10^6 bytes above the inputs",
            "error": "relative Frobenius norm against float64",
        },
    }
    if settings.device == "cuda":
        device = torch.cuda.get_device_properties(torch.cuda.current_device())
        facts["gpu"] = device.name
        facts["gpu_capability"] = f"{device.major}.{device.minor}"
        facts["cuda"] = torch.version.cuda
    return facts


def _command() -> str | None:
    """What was typed to start this benchmark; None where something else called it."""
    script = Path(sys.argv[0]).resolve()
    if script.parent != ROOT / "bench":
        return None
    return shlex.join(["python", f"bench/{script.name}", *_without_files(sys.argv[1:])])


def _without_files(arguments: Sequence[str]) -> list[str]:
    """The arguments but for those that say where results go."""
    kept, skip = [], False
    for word in arguments:
        name, has_value, _ = word.partition("=")
        if not skip and name not in ("--json", "--plot"):
            kept.append(word)
        skip = not skip and name in ("--json", "--plot") and not has_value
    return kept


def version(distribution: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> tuple[str, list[str]]:
    name, flags = platform.processor() or platform.machine(), set()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = set(value.split())
                break
    return name, [flag for flag in _CPU_FEATURES if flag in flags]


def _memory_gb() -> float | None:
    try:
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None
    return round(size / 1e9, 1)


def _git_commit() -> str | None:
    """The commit of this checkout, marked when the tree differs from it in more than results."""
    commit = _git("rev-parse", "--short=12", "HEAD")
    if commit is None:
        return None
    tracked = ("status", "--porcelain", "--untracked-files=no", "--")
    changes = _git(*tracked, ":(top)", ":(top,exclude)bench/results")
    return f"{commit}-dirty" if changes else commit


def _git(*command: str) -> str | None:
    """What git says; None where there is none, or no repository."""
    try:
        found = subprocess.run(
            ("git", "-C", str(ROOT), *command),
            capture_output=True, text=True, timeout=10, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if found.returncode == 0 else None


def group_key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What rows must share to be compared."""
    return row["op"], row["dtype"], tuple(sorted(row["shape"].items())), row["phase"]


def groups(rows: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Rows by `group_key`, in the order in which they came."""
    found: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(group_key(row), []).append(row)
    return list(found.values())


def write_json(path: Path, facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write {"meta": ..., "rows": [...]}, whole or not at all."""
    text = json.dumps({"meta": facts, "rows": list(rows)}, indent=1) + "\n"
    with _atomic_file(path) as file:
        file.write(text.encode())


def _atomic_file(path: Path) -> AbstractContextManager[BinaryIO]:
    from fastvlp.data.shards.write import atomic_file  # not before there is something to write

    return atomic_file(path)


def require_plotting() -> None:
    """Refuse a plot before the measurements rather than after them."""
    if importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("--plot needs matplotlib: pip install -e '.[bench]'")


def plot(
    path: Path, rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], key: str, label: str
) -> None:
    """Draw time (above) and extra peak memory (below) against shape[key], one column per dtype."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure, axes = plt.subplots(
        2,
        len(dtypes),
        figsize=(5.2 * len(dtypes) + 1, 9.5),
        squeeze=False,
        sharex="col",
        layout="constrained",
    )
    names = list(dict.fromkeys(row["impl"] for row in rows))
    peers = [name for name in names if name != OURS and not name.startswith(BOUND)]
    bounds = [name for name in names if name.startswith(BOUND)]
    for column, dtype in enumerate(dtypes):
        group = [row for row in rows if row["dtype"] == dtype]
        present = [name for name in peers if any(row["impl"] == name for row in group)]
        for panel, value in zip(axes[:, column], ("ms", "peak_mb"), strict=True):
            for name in names:
                line = sorted(
                    (row["shape"][key] * _dodge(name, present), row[value])
                    for row in group
                    if row["impl"] == name and row[value]
                )
                if line:
                    panel.plot(*zip(*line, strict=True), label=name, **_style(name, peers, bounds))
            _dress(panel, sorted({row["shape"][key] for row in group}))
        axes[0, column].set_title(dtype)
        axes[1, column].set_xlabel(label)
        axes[1, column].legend(
            *axes[0, column].get_legend_handles_labels(),
            loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, fontsize=8, frameon=False,
        )  # fmt: skip
    axes[0, 0].set_ylabel("time, ms")
    axes[1, 0].set_ylabel("extra peak memory, MB")
    where = facts.get("gpu") or f"{facts['cpu']}, {facts['threads']} threads"
    figure.suptitle(
        f"{rows[0]['op']}, {rows[0]['phase']}\n{where}, torch {facts['versions']['torch']}",
        fontsize=11,
    )
    save_figure(path, figure, dpi=150)
    plt.close(figure)


def _dodge(name: str, peers: Sequence[str]) -> float:
    """The factor by which a peer's markers stand aside, so that equal values show side by side."""
    return 2 ** (0.06 * (peers.index(name) - (len(peers) - 1) / 2)) if name in peers else 1.0


def save_figure(path: Path, figure: Any, dpi: int) -> None:
    """Write a matplotlib figure in the format that the file's name ends with, whole or not at
    all."""
    with _atomic_file(path) as file:
        figure.savefig(file, dpi=dpi, format=path.suffix.lstrip(".") or "png")


def _style(name: str, peers: Sequence[str], bounds: Sequence[str]) -> dict[str, Any]:
    if name == OURS:
        return {"color": "#D55E00", "linewidth": 3.2, "marker": "o", "markersize": 7, "zorder": 5}
    if name in bounds:
        return {
            "color": "#444444",
            "linewidth": 1.2,
            "marker": "_",
            "zorder": 2,
            "linestyle": ("--", ":", "-.")[bounds.index(name) % 3],
        }
    index = peers.index(name)
    return {
        "color": _PALETTE[index % len(_PALETTE)],
        "marker": "sv^D<>P*X"[index % 9],
        "linewidth": 1.5,
        "markersize": 5,
        "zorder": 3,
    }


def _dress(panel: Any, ticks: Sequence[int]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.grid(True, which="major", alpha=0.3)
