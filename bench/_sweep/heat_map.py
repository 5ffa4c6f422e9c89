"""The picture of a sweep: how many times as fast as the best peer, cell by cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _harness.report import save_figure

WORST, BEST = 0.5, 4.0  # where the colours end


def draw(path: Path, found: Sequence[Mapping[str, Any]], title: str) -> None:
    """A panel for each op: shapes across, and dtype, phase and instruction set down."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import TwoSlopeNorm

    panels = [table([cell for cell in found if cell["op"] == op]) for op in ops(found)]
    heights = [len(rows) for rows, _, _ in panels]
    figure, axes = plt.subplots(
        len(panels), 1, squeeze=False, layout="constrained",
        figsize=(10, 0.24 * sum(heights) + 1.1 * len(panels) + 0.6),
        gridspec_kw={"height_ratios": heights},
    )  # fmt: skip
    norm = TwoSlopeNorm(1.0, WORST, BEST)
    for axis, op, (rows, columns, ratios) in zip(axes[:, 0], ops(found), panels, strict=True):
        values = [[ratios.get((row, column), float("nan")) for column in columns] for row in rows]
        picture = axis.imshow(values, cmap="PiYG", norm=norm, aspect="auto")
        for (row, column), ratio in ratios.items():
            axis.text(
                columns.index(column), rows.index(row), f"{ratio:.2f}", ha="center", va="center",
                fontsize=7, color="black" if WORST * 1.4 < ratio < BEST * 0.75 else "white",
            )  # fmt: skip
        axis.set_xticks(range(len(columns)), columns, fontsize=7)
        axis.set_yticks(range(len(rows)), rows, fontsize=7)
        axis.set_title(op, fontsize=9, loc="left")
        axis.tick_params(length=0)
    bar = figure.colorbar(picture, ax=axes[:, 0], shrink=0.3, ticks=[WORST, 1.0, 2.0, BEST])
    bar.set_ticklabels([f"{value:g}x" for value in (WORST, 1.0, 2.0, BEST)])
    bar.set_label("times as fast as the best peer")
    figure.suptitle(title, fontsize=10)
    save_figure(path, figure, dpi=130)
    plt.close(figure)


def ops(found: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(cell["op"] for cell in found))


def table(
    group: Sequence[Mapping[str, Any]],
) -> tuple[list[str], list[str], dict[tuple[str, str], float]]:
    """Names of rows and columns of one op's cells, and the ratios by both."""
    shapes = [cell["shape"] for cell in group]
    varied = [key for key in shapes[0] if len({shape[key] for shape in shapes}) > 1]
    ratios = {}
    for cell in group:
        row = f"{cell['dtype']} {cell['phase']}, {cell['isa']}"
        named = [f"{key} {cell['shape'][key]}" for key in varied or cell["shape"]]
        column = ("\n" if varied else ", ").join(named)
        ratios[row, column] = cell["ratio"]
    rows, columns = ({names[i]: None for names in ratios} for i in (0, 1))
    return sorted(rows), list(columns), ratios
