"""Tables and charts of the files in bench/results, so that no page repeats a number by hand."""

import functools
import io
import json
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "bench" / "results"
OURS, FLOOR, PEER = "#d55e00", "#999999", "#0072b2"


def charted():
    """Names below FOLDER of the results that are times of several implementations."""
    names = (path.relative_to(FOLDER).as_posix() for path in sorted(FOLDER.rglob("*_cpu.json")))
    return [name for name in names if any(row.get("ms") for row in _read(name)["rows"])]


def chart_name(name):
    return f"charts/{Path(name).with_suffix('.svg')}"


@functools.cache
def _read(name):
    return json.loads((FOLDER / name).read_text())


def groups(name):
    """Rows that can be compared, fastvlp's first, in the order in which they were measured."""
    found = {}
    for row in _read(name)["rows"]:
        if row.get("ms"):
            key = row["op"], row["dtype"], tuple(row["shape"].items()), row["phase"]
            found.setdefault(key, []).append(row)
    return [sorted(rows, key=lambda row: row["impl"] != "fastvlp") for rows in found.values()]


def title(row):
    shape = ", ".join(f"{key} {_count(value)}" for key, value in row["shape"].items())
    return f"{row['op']}, {row['phase']}, {row['dtype']}: {shape}"


def circumstances(name):
    """One line on where the file's numbers come from."""
    meta = _read(name)["meta"]
    threads = f"{meta['threads']} thread{'s' * (meta['threads'] != 1)}"
    where = meta.get("gpu") or f"{meta['cpu']}, {meta['cores']} cores, {threads}"
    made = [f"`{meta['command']}`"] if meta.get("command") else []
    made += [
        where,
        f"torch {meta['versions']['torch']}",
        f"commit {meta['git']}",
        meta["date"][:10],
    ]
    return ", ".join(made)


def tables(name):
    """A Markdown table for each group of the file."""
    parts = [f"{circumstances(name)}."]
    for rows in groups(name):
        unit = next((row["ms"] for row in rows if row["impl"] == "fastvlp"), None)
        parts.append(f"**{title(rows[0])}**")
        lines = [
            "| implementation | ms | time / fastvlp | extra memory, MB | error |",
            "|---|--:|--:|--:|--:|",
        ]
        for row in rows:
            cells = [
                f"**{row['impl']}**" if row["impl"].startswith("fastvlp") else row["impl"],
                _digits(row["ms"]),
                f"{row['ms'] / unit:.2f}" if unit else "",
                _digits(row.get("peak_mb")),
                f"{row['error']:.1e}" if row.get("error") is not None else "",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def chart(name):
    """SVG with a panel of bars for each group of the file."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    panels = [rows for rows in groups(name) if len(rows) > 1]
    bars = [len(rows) for rows in panels]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(8, 0.28 * sum(bars) + 0.75 * len(panels) + 0.3), squeeze=False,
        layout="constrained", height_ratios=[count + 0.6 for count in bars],
    )  # fmt: skip
    for axis, rows in zip(axes[:, 0], panels, strict=True):
        names = [row["impl"] for row in rows]
        times = [row["ms"] for row in rows]
        axis.barh(range(len(rows)), times, color=[_color(row["impl"]) for row in rows], height=0.72)
        axis.bar_label(axis.containers[0], [f" {_digits(ms)}" for ms in times], fontsize=8)
        axis.set_yticks(range(len(rows)), names, fontsize=8)
        axis.invert_yaxis()
        axis.set_xlim(0, max(times) * 1.15)
        axis.tick_params(axis="x", labelsize=7)
        axis.set_title(title(rows[0]), fontsize=9, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("milliseconds, median", fontsize=8)
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    plt.close(figure)
    return out.getvalue()


def _color(implementation):
    if implementation.startswith("fastvlp"):
        return OURS
    return FLOOR if implementation.startswith("floor") else PEER


def _count(value):
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _digits(value):
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}" if value >= 1 else f"{value:.2g}"
