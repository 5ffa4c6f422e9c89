"""Measures cells in a process of its own: the CPU kernels choose an instruction set only once.

    FASTVLP_CPU_ISA=avx2 python -m _sweep.child FLAGS < CELLS

CELLS is a JSON list of cells; FLAGS are those that all benchmarks have. For each cell a line of
JSON is printed as soon as it is measured: its rows, or the reason why there are none.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for cell in json.load(sys.stdin):
            print(json.dumps(measured(cell, Path(folder) / "found.json")), flush=True)


def measured(cell: dict[str, Any], target: Path) -> dict[str, Any]:
    flags = [
        *sys.argv[1:], "--rounds", str(cell["rounds"]), *cell["flags"], "--no-memory",
        "--json", str(target),
    ]  # fmt: skip
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            importlib.import_module(cell["script"]).main(flags)
    except SystemExit as error:  # argparse has said why before it
        return {"cell": cell, "error": f"{said.getvalue()}{error}"}
    except Exception as error:
        return {"cell": cell, "error": f"{type(error).__name__}: {error}"}
    return {"cell": cell, "rows": json.loads(target.read_text())["rows"]}


if __name__ == "__main__":
    main()
