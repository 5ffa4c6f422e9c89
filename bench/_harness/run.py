"""The frame of every benchmark: what was measured is shown and kept at once."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from _harness import measure, report, table
from _harness.measure import Implementation, Missing

INTERRUPTED = 128 + 2  # as shells report a process that SIGINT ended


class Run:
    """The rows of one benchmark's run, printed and kept as they come.

        with Run(args, PACKAGES, axis=("n", "pairs N"), summary=summary) as run:
            for dtype in args.dtype:
                run.compare(OP, implementations(dtype), build, tiny, dtype=dtype, shape=shape)

    `compare` is `measure.compare` with the run's settings, and `add` of what it finds. `add` prints
    the tables of its rows and rewrites the files of `--json` and `--plot`, each whole or not at
    all; their `meta` has `complete: false` until the block has ended. At the end what is missing
    and the summary are printed. Ctrl-C keeps what `add` has been given and exits with status 130.

    Args:
        args: parsed flags of a `measure.parser`. With --no-compile, or --quick where there is that
            flag, `with_compiled` is False and no comparison has compiled implementations; with
            --no-memory none has the peak memory.
        packages: distributions whose versions are kept next to those of torch and fastvlp.
        axis: (key of `shape`, label) of the plot; None: the benchmark has no plot.
        rate, columns: as in `table.table`.
        legend: what `columns` mean; printed once, under the first table, with what all have.
        summary: the text that ends a whole run, of all rows.
        facts: further entries of `meta`, which may be added to later.
    """

    draws_as_it_goes = True  # False: a plot that takes long is drawn once, at the end

    def __init__(
        self,
        args: argparse.Namespace,
        packages: Sequence[str] = (),
        *,
        axis: tuple[str, str] | None = None,
        rate: tuple[str, str] | None = None,
        columns: Sequence[str] = (),
        legend: str = "",
        summary: Callable[[Sequence[Mapping[str, Any]]], str] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.settings = measure.settings_from(args)
        self.rows: list[dict[str, Any]] = []
        self.missing: list[Missing] = []
        self.facts = dict(facts or {})
        self.with_compiled = "no_compile" not in args or not (args.no_compile or args.quick)
        self._with_memory = "no_memory" not in args or not args.no_memory
        if not self.with_compiled:
            self.missing.append(Missing("torch.compile", "left out", "no --quick, --no-compile"))
        self._json, self._plot = args.json, args.plot
        self._packages, self._axis = packages, axis
        self._rate, self._columns = rate, columns
        self._legend = " ".join([table.LEGEND, legend]).strip()
        self._summary = summary
        if self._plot and not axis:
            raise SystemExit("--plot: this benchmark draws nothing; --json keeps its numbers")
        if self._plot:
            report.require_plotting()
        for path in (self._json, self._plot):
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._keep(complete=True)
            self._end()
            if self._summary:
                self.print(self._summary(self.rows))
        elif kind is KeyboardInterrupt:
            if self.rows:
                self._keep(complete=False)
                self._end()
            self.print(self._interruption())
            raise SystemExit(INTERRUPTED)

    def compare(
        self,
        op: str,
        implementations: Sequence[Implementation],
        build: Callable[[], Any],
        tiny: Callable[[], Any],
        *,
        missing: Sequence[Missing] = (),
        measure_memory: bool = True,
        **options: Any,
    ) -> None:
        """Compare the implementations and `add` their rows, and `missing`: those that cannot run.

        The other arguments are those of `measure.compare`.
        """
        rows, failed = measure.compare(
            op,
            [each for each in implementations if self.with_compiled or not each.compiled],
            build,
            tiny,
            self.settings,
            measure_memory=measure_memory and self._with_memory,
            **options,
        )
        self.add(rows, [*missing, *failed])

    def add(self, rows: Sequence[dict[str, Any]], missing: Sequence[Missing] = ()) -> None:
        """Print and keep the rows of one comparison or more, and what could not be measured."""
        self.rows += rows
        self.missing += [each for each in dict.fromkeys(missing) if each not in self.missing]
        self.show(rows)
        print(flush=True)
        self._keep(complete=False, draw=self.draws_as_it_goes)

    def print(self, text: str) -> None:
        """Print a text at once, whatever standard output is."""
        print(text, flush=True)

    def show(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Print a table for each comparison among `rows`."""
        for group in report.groups(rows):
            table.table(group, self._rate, self._columns)
        if self._legend:
            table.console().print(self._legend, markup=False, highlight=False)
            self._legend = ""

    def draw(self, path: Path) -> None:
        """Draw the rows that have the axis."""
        key, label = self._axis
        rows = [row for row in self.rows if key in row["shape"]]
        if rows:
            report.plot(path, rows, self.meta, key, label)

    @functools.cached_property
    def meta(self) -> dict[str, Any]:
        """The circumstances of the run."""
        return report.meta(self.settings, self._packages)

    def _keep(self, complete: bool, draw: bool = True) -> None:
        if self._json:
            missing = [vars(each) for each in self.missing]
            state = {"complete": complete, "missing": missing}
            report.write_json(self._json, self.meta | state | self.facts, self.rows)
        if self._plot and draw:
            self.draw(self._plot)

    def _end(self) -> None:
        if self.missing:
            self.print("\n".join(["Not measured:", *(f"  {each}" for each in self.missing)]))

    def _interruption(self) -> str:
        kept = [str(path) for path in (self._json, self._plot) if path and self.rows]
        where = f", kept in {' and '.join(kept)}" if kept else ""
        count = len(report.groups(self.rows))
        return f"Interrupted after {count} comparison{'s' * (count != 1)}{where}."
