"""The table of one comparison: whatever the width of the terminal, no number is cut."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from _harness.measure import BOUND, OURS

# Of a pipe, which has no width.
PIPE_WIDTH = 140
# The implementation's name folds to no less than this.
LEAST_NAME = 20
GAP = 2
LEGEND = (
    "ms: median of the rounds. peak MB: 10^6 bytes beyond the inputs. error: the largest relative "
    "error of the results against float64 (Frobenius norm)."
)
# Share of the CPU above which others' work shows in the medians.
DISTURBED = 0.05


def console() -> Console:
    """Standard output, as wide as its terminal or as the variable COLUMNS says."""
    found = Console()
    if found.is_terminal or os.environ.get("COLUMNS", "").isdigit():
        return found
    return Console(width=PIPE_WIDTH)


@dataclass(frozen=True)
class Column:
    """A heading, which may break between its words, and cells that may not break."""

    heading: str
    cells: Sequence[str]

    @property
    def width(self) -> int:
        return max(map(len, [*self.heading.split(), *self.cells]))


def blocks(names: Column, columns: Sequence[Column], width: int) -> list[list[Column]]:
    """`columns` in as few blocks as fit into `width` next to the names, folded or not."""
    room = width - min(names.width, LEAST_NAME)
    found: list[list[Column]] = [[]]
    left = room
    for column in columns:
        if found[-1] and column.width + GAP > left:
            found.append([])
            left = room
        found[-1].append(column)
        left -= column.width + GAP
    return found


def print_grid(
    title: str, names: Column, columns: Sequence[Column], styles: Sequence[str] = ()
) -> None:
    """Print a table on standard output, in several parts where it is too wide for the terminal."""
    out = console()
    for part, block in enumerate(blocks(names, columns, out.width)):
        taken = sum(column.width + GAP for column in block)
        grid = Table(
            title=None if part else Text(title),
            title_justify="left",
            box=box.SIMPLE_HEAD,
            show_edge=False,
            padding=(0, GAP - 1, 0, 0),
            pad_edge=False,
        )
        # At least 1: on a terminal narrower than any number there is nothing to keep.
        room = max(1, min(names.width, out.width - taken))
        grid.add_column(names.heading, width=room, overflow="fold")
        for column in block:
            grid.add_column(column.heading, width=column.width, justify="right")
        for line, name in enumerate(names.cells):
            cells = (Text(column.cells[line]) for column in block)
            grid.add_row(Text(name), *cells, style=styles[line] if styles else "")
        out.print(grid)


def table(
    group: Sequence[Mapping[str, Any]],
    rate: tuple[str, str] | None = None,
    extra_columns: Sequence[str] = (),
) -> None:
    """Print the table of one comparison, and under it what its implementations are.

    rate: (heading, key of `shape`): adds a column of shape[key] per second.
    extra_columns: further row fields to show.
    """
    first = group[0]
    rows = sorted(group, key=lambda each: each["ms"] or float("inf"))
    shape = ", ".join(f"{key}={value}" for key, value in first["shape"].items())
    columns = [Column(key, [str(row.get(key) or "") for row in rows]) for key in extra_columns]
    columns.append(Column("ms", [_show(row["ms"], ".1f") for row in rows]))
    columns.append(Column("quartiles", list(map(_quartiles, rows))))
    if rate:
        columns.append(Column(rate[0], [_rate(row, rate[1]) for row in rows]))
    columns += [
        Column(f"time / {OURS}", [_show(ratio(group, row), ".2f") for row in rows]),
        Column("peak MB", [_show(row["peak_mb"], ".1f") for row in rows]),
        Column("error", [_show(row["error"], ".1e") for row in rows]),
    ]
    print_grid(
        f"{first['op']} {first['phase']}, {first['dtype']}, {shape}",
        Column("implementation", [row["impl"] for row in rows]),
        columns,
        [_style(row["impl"]) for row in rows],
    )
    print_notes(rows)
    busy = first.get("neighbours") or 0.0
    if busy > DISTURBED:
        print(f"Other processes took {busy:.0%} of the CPU meanwhile: do not rely on these times.")


def print_notes(rows: Sequence[Mapping[str, Any]]) -> None:
    """A line for each implementation that its name alone does not explain."""
    out = console()
    for name, note in {row["impl"]: row.get("note") for row in rows}.items():
        if note:
            out.print(f"  {name}: {note}.", markup=False, highlight=False)


def ratio(group: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> float | None:
    """How many times as long as fastvlp this row took."""
    ours = next((each["ms"] for each in group if each["impl"] == OURS), None)
    return row["ms"] / ours if ours and row["ms"] else None


def _style(name: str) -> str:
    return "bold" if name == OURS else "dim" if name.startswith(BOUND) else ""


def _show(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def _quartiles(row: Mapping[str, Any]) -> str:
    if row["ms"] is None or row["rounds"] < 2:
        return ""
    return f"{row['ms_q1']:.1f}–{row['ms_q3']:.1f}"


def _rate(row: Mapping[str, Any], key: str) -> str:
    return f"{row['shape'][key] / row['ms'] * 1e3:,.0f}" if row["ms"] else ""
