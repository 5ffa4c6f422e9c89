"""How far a command is: a bar on a terminal, and a line every few seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fastvlp.data.optional import require

# Between lines where there is no terminal for a bar.
_SECONDS = 10.0


@contextmanager
def progress(
    about: str, total: int, unit: str, shown: bool = True
) -> Iterator[Callable[..., None]]:
    """A function to call with the number of things that were done, and a text about them or "".

    Args:
        about: what is done, in a word.
        total: how many things there are.
        unit: what they are, in the plural.
        shown: without, nothing is printed.

    Examples:
        >>> with progress("resizing", 2, "images", shown=False) as advance:
        ...     for image in ("a.png", "b.png"):
        ...         advance(1)
    """
    rich = require("rich.progress")
    bar = rich.Progress(
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.TextColumn(f"{{task.completed:.0f}}/{{task.total:.0f}} {unit}"),
        rich.TextColumn("{task.fields[more]}"),
        rich.TimeRemainingColumn(),
    )
    # Lines take the place of a bar that nobody would see.
    lines = shown and not bar.console.is_terminal
    bar.disable = lines or not shown
    done, said, last = 0, time.monotonic(), ""

    def say() -> None:
        print(f"{about}: {done} of {total} {unit}{', ' * bool(last)}{last}", flush=True)

    with bar:
        task = bar.add_task(about, total=total, more="")

        def advance(count: int, more: str = "") -> None:
            nonlocal done, said, last
            done, last = done + count, more
            bar.update(task, advance=count, more=more)
            if lines and time.monotonic() - said >= _SECONDS:
                said = time.monotonic()
                say()

        yield advance
    if lines:
        say()
