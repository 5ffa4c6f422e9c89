"""What every benchmark's output has in common."""

import json

from _harness import measure

FIELDS = {"op", "impl", "dtype", "shape", "phase", "ms", "peak_mb", "error"}
# One round, and one thread: two would wait for each other where tests share the cores.
BRIEF = ["--quick", "--threads", "1", "--rounds", "1", "--seconds", "0.01"]
FLAGS = [*BRIEF, "--device", "cpu"]


def quick_rows(main, target, *flags):
    """(meta, rows) that a quick run of a benchmark's `main` writes, checked for what all share."""
    main([*FLAGS, "--json", str(target), *flags])
    found = json.loads(target.read_text())
    assert set(found) == {"meta", "rows"}
    meta, rows = found["meta"], found["rows"]
    assert (meta["threads"], meta["device"], meta["quick"]) == (1, "cpu", True)
    assert {"torch", "fastvlp"} <= set(meta["versions"]) and meta["cpu"]
    for row in rows:
        assert FIELDS <= set(row) and row["ms"] > 0
        bound = row["impl"].startswith(measure.BOUND)
        assert (row["error"] is None) == bound
        if bound:
            assert row["peak_mb"] is None
    return meta, rows


def missing_names(meta):
    return {each["name"] for each in meta["missing"]}


def assert_all_compute(implementations, inputs, truth, tolerance):
    """The results `truth` by name, within `tolerance`, by each implementation but the bound."""
    for implementation in implementations:
        found = implementation.make(inputs)()
        if implementation.bound:
            assert found is None
            continue
        assert set(found) == set(truth)
        for name, value in truth.items():
            error = measure.relative_error(found[name], value)
            assert error < tolerance, (implementation.name, name)
