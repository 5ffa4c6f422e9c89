"""What a run prints, as lines of at most 80 columns: its beginning, its steps, its scores, its end.

The same lines go to a terminal and to a file; all numbers in full are in log.jsonl.
"""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastvlp.train.parallel import Ranks

WIDTH = 80
_LABEL = 10
# Of a row of the log: what counts only where it is not 0, and what has its place in the line.
_WRONG = ("skipped", "steps_without_pairs")
_SHOWN = ("step", "loss", "lr", "pairs_per_second", *_WRONG)


def opening(
    *, model: nn.Module, name: str, data: Mapping[str, Any], config: Any, ranks: Ranks,
    steps: int, precision: torch.dtype | None, epochs: float,
) -> list[str]:  # fmt: skip
    """What a run is about to do.

    Args:
        model: before it is wrapped for several ranks.
        name: of its size.
        data: loaders by what they are, the one to train on first.
        config: the settings.
        steps: of the whole run.
        precision: autocast dtype.
        epochs: passes over the data, of which what fills no whole step is left out.
    """
    autocast = "float32" if precision is None else str(precision).removeprefix("torch.")
    count = sum(parameter.numel() for parameter in model.parameters())
    size = getattr(model.config, "image_size", None)
    (_, train), *others = data.items()
    pairs = getattr(train, "samples", None)
    held_out = [f"{getattr(loader, 'samples', '?')} in {key}" for key, loader in others]
    facts = {
        "device": f"{_device(ranks)}, {autocast}",
        "model": f"{name}: {amount(count)} parameters, images of {size} x {size} pixels",
        "data": f"{pairs} pairs of {config.data}",
        "held out": ", ".join(held_out),
        "length": f"{steps} steps of {config.batch_size} pairs, {epochs:.3g} epochs",
        "results": f"{config.folder} (model, checkpoints, log.jsonl, tensorboard)",
    }
    return [line for label, fact in facts.items() if fact for line in labelled(label, fact)]


def _device(ranks: Ranks) -> str:
    if ranks.device.type == "cpu":
        threads = torch.get_num_threads()
        here = f"CPU, {threads} {'thread' if threads == 1 else 'threads'}"
    else:
        here = torch.cuda.get_device_name(ranks.device)
    return here if ranks.world_size == 1 else f"{ranks.world_size} ranks of {here}"


def labelled(label: str, text: str) -> list[str]:
    """A line with a label, and further ones where the text is long."""
    return textwrap.wrap(
        text, WIDTH, initial_indent=f"{label:{_LABEL}}", subsequent_indent=" " * _LABEL,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def amount(count: int) -> str:
    """A large number in three digits.

    Examples:
        >>> amount(950), amount(4_520_000), amount(151_277_313)
        ('950', '4.52 M', '151 M')
    """
    for size, name in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if count >= size:
            return f"{count / size:#.3g}".rstrip(".") + name
    return str(count)


def duration(seconds: float) -> str:
    """A time as it is read: seconds, or minutes and seconds, or hours and minutes.

    Examples:
        >>> duration(4.2), duration(83), duration(7385)
        ('4.2 s', '1 min 23 s', '2 h 3 min')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def step_line(row: Mapping[str, Any], steps: int) -> str:
    """A row of the log: the loss, the rate, what went wrong, and of the rest what has room."""
    line = f"step {row['step']}/{steps}"
    if "loss" in row:
        line += f"  loss {row['loss']:.4g}"
    line += f"  lr {row['lr']:.3g}  {row['pairs_per_second']:.3g} pairs/s"
    wrong = [name for name in _WRONG if row.get(name)]
    for name in wrong:
        line += f"  {name} {row[name]}"
    for name in row:
        more = f"  {name} {row[name]:.4g}"
        if name not in _SHOWN and len(line) + len(more) <= WIDTH:
            line += more
    return line


def bar_text(row: Mapping[str, Any]) -> str:
    """What stands beside the bar."""
    loss = f"loss {row['loss']:.4g}  " if "loss" in row else ""
    skipped = f"  {row['skipped']} skipped" if row.get("skipped") else ""
    return f"{loss}{row['pairs_per_second']:.3g} pairs/s{skipped}"


def groups(scores: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Scores by what they are of: "eval/text_to_image/R@1" is R@1 of eval/text_to_image."""
    found: dict[str, dict[str, float]] = {}
    for name, value in scores.items():
        of, _, measure = name.rpartition("/")
        found.setdefault(of, {})[measure] = value
    return found


def score_lines(step: int, steps: int, scores: Mapping[str, float]) -> list[str]:
    """The scores in the middle of a run, one line for each thing that they are of."""
    lines = []
    for of, measures in groups(scores).items():
        shown = "".join(f"  {name} {value:.4g}" for name, value in measures.items())
        lines.append(f"step {step}/{steps}  {of}{shown}")
    return lines


def table(scores: Mapping[str, float]) -> list[str]:
    """The scores as tables: a row for each thing that they are of, a column for each measure.

    Examples:
        >>> print("\\n".join(table({"eval/a/R@1": 0.5, "eval/a/R@5": 1, "eval/loss": 2})))
        scores     R@1     R@5
        eval/a  0.5000  1.0000
        <BLANKLINE>
        scores    loss
        eval    2.0000
    """
    kinds: dict[tuple[str, ...], dict[str, dict[str, float]]] = {}
    for of, measures in groups(scores).items():
        kinds.setdefault(tuple(measures), {})[of] = measures
    label = max([len("scores"), *(len(of) for rows in kinds.values() for of in rows)])
    lines = []
    for measures, rows in kinds.items():
        lines += [""] * bool(lines)
        widths = [max(6, len(name)) for name in measures]
        head = "".join(f"  {name:>{w}}" for name, w in zip(measures, widths, strict=True))
        lines.append(f"{'scores':{label}}{head}")
        for of, values in rows.items():
            cells = zip(measures, widths, strict=True)
            lines.append(f"{of:{label}}" + "".join(f"  {values[n]:>{w}.4f}" for n, w in cells))
    return lines


_COMMANDS = {
    "clip": ("evaluate retrieval {0}{1}", 'search {0} "a red bus" --images FOLDER'),
    "vilt": ("evaluate matching {0}{1}",),
    "albef": ("evaluate retrieval {0}{1}",),
}


def next_commands(system: str, folder: Path, has_data: bool) -> Sequence[str]:
    """What can be done with the model, as commands to copy."""
    place = shlex.quote(str(folder))
    data = "" if has_data else " --data SHARDS"
    return [f"  fastvlp {each.format(place, data)}" for each in _COMMANDS[system]]
