"""bench/sweep.py: cells are those of the other benchmarks, ratios those of the best peer."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sweep
import torch
from _sweep import child, heat_map, overhead
from _sweep.cells import cells

RESULTS = Path(__file__).parents[2] / "bench" / "results"


def row(impl, ms, error=1e-6, isa="avx2", n=8, **extra):
    shape = {"n": n, "d": 4}
    return {
        "op": "contrastive", "impl": impl, "dtype": "fp32", "shape": shape, "phase": "fwd+bwd",
        "ms": ms, "peak_mb": None, "error": error, "isa": isa, **extra,
    }  # fmt: skip


@pytest.mark.parametrize("quick", [True, False])
def test_benchmarks_take_the_flags_of_their_cells(quick):
    for cell in cells(quick):
        script = importlib.import_module(cell.script)
        script.parse([*cell.flags, "--no-memory", "--rounds", str(cell.rounds)])


@pytest.mark.parametrize("quick", [True, False])
def test_every_op_has_cells(quick):
    folders = {path.parent.name for path in RESULTS.glob("*/*.json")}
    assert len(folders) > 6 and {cell.op for cell in cells(quick)} == folders | {"self_attention"}


def test_a_ratio_is_that_of_the_fastest_peer_of_our_accuracy():
    group = [
        row("fastvlp", 2.0), row("floor", 0.5, None), row("eager", 5.0), row("sdpa", 3.0),
        row("low", 1.0, 5e-6), row("rounded", 1.0, softmax="bf16"), row("absent", None),
    ]  # fmt: skip
    found = sweep.summarised(group)
    assert (found["peer"], found["peer_ms"], found["ratio"]) == ("sdpa", 3.0, 1.5)
    assert "1.50x as fast as sdpa" in sweep.line(group) and "<--" not in sweep.line(group)
    assert "<--" in sweep.line([row("fastvlp", 2.0), row("eager", 1.8)])
    assert sweep.summarised(group[:2]) is None and "no peer" in sweep.line(group[:2])


def test_cells_of_instruction_sets_are_apart():
    rows = [row(impl, ms, isa=isa) for isa, ms in (("amx", 1.0), ("avx2", 2.0)) for impl in
            ("fastvlp", "eager")]  # fmt: skip
    found = [sweep.summarised(group) for group in sweep.groups(rows)]
    assert [(cell["isa"], cell["ms"], cell["ratio"]) for cell in found] == [
        ("amx", 1.0, 1.0), ("avx2", 2.0, 1.0),
    ]  # fmt: skip
    assert sweep.summary(rows).splitlines()[1] == "2 cells, 0 below 0.95x of the best peer."


def test_columns_are_the_sizes_that_differ():
    found = [
        sweep.summarised([row("fastvlp", 1.0, n=n), row("eager", float(n), n=n)]) for n in (2, 4)
    ]
    names, columns, ratios = heat_map.table(found)
    assert (names, columns) == (["fp32 fwd+bwd, avx2"], ["n 2", "n 4"])
    assert ratios == {(names[0], "n 2"): 2.0, (names[0], "n 4"): 4.0}
    assert heat_map.table(found[:1])[1] == ["n 2, d 4"]


def test_a_cell_that_fails_says_why(tmp_path):
    cell = {"script": "matmul", "flags": ["--rows", "1"], "rounds": -1}
    found = child.measured(cell, tmp_path / "found.json")
    assert "--rounds" in found["error"] and "rows" not in found


def test_a_quick_run_is_under_the_set_that_is_asked_for(tmp_path, capsys):
    isa = sweep.instruction_sets()[-1]
    target, picture = tmp_path / "found.json", tmp_path / "found.png"
    sweep.main(
        ["--quick", "--op", "contrastive", "--isa", isa, "--rounds", "1", "--threads", "1",
         "--seconds", "0.01", "--json", str(target), "--plot", str(picture)]
    )  # fmt: skip
    found = json.loads(target.read_text())
    assert found["meta"]["complete"] and found["meta"]["instruction_sets"] == [isa]
    assert {each["isa"] for each in found["rows"]} == {isa}
    assert {each["dtype"] for each in found["rows"]} == {"fp32", "bf16"}
    assert all(each["ms"] > 0 for each in found["rows"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("x as fast as") == 2


def test_an_instruction_set_is_the_largest_for_torch_too():
    usable = sweep.instruction_sets()
    assert set(usable) <= set(sweep.LIMITS)
    ask = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    environment = os.environ | sweep.LIMITS["avx2"]
    told = subprocess.check_output([sys.executable, "-c", ask], text=True, env=environment)
    assert told.strip() == "AVX2"


def test_the_largest_shapes_are_measured_once():
    once = [cell for cell in cells(quick=False) if cell.once]
    assert {cell.op for cell in once} < {cell.op for cell in cells(quick=False) if not cell.once}
    assert len(once) > 2 and not any(cell.once for cell in cells(quick=True))


def test_an_instruction_set_that_is_not_there_is_named(capsys):
    with pytest.raises(SystemExit):
        sweep.parse(["--isa", "avx9"])
    assert "avx9" in capsys.readouterr().err


def test_calls_of_the_overhead_table_compute_the_same():
    found = [case for case in overhead.cases() if case.phase == "fwd"]
    assert len(found) > 5
    for case in found:
        torch.testing.assert_close(case.call(), case.torch_call())


def test_the_overhead_table_has_every_op(capsys):
    before = torch.get_num_threads()
    rows = overhead.measured(calls=1, batches=1)
    assert torch.get_num_threads() == before
    ops = {cell.op for cell in cells(quick=False)} - {"self_attention"}
    assert {row["op"] for row in rows} == ops
    assert all(row["us"] > 0 and row["torch_us"] > 0 for row in rows)
    lines = overhead.table([rows[0] | {"us": 41.7, "torch_us": 87.2}]).splitlines()
    assert lines[2] == "| `contrastive` | 8 x 64 | fwd | 42 | 87 |"


def test_overhead_prints_the_ops_that_are_asked_for(monkeypatch, capsys):
    found = [
        {"op": op, "shape": "2", "phase": "fwd", "us": 1.0, "torch_us": 2.0}
        for op in ("matmul", "ema")
    ]
    monkeypatch.setattr(overhead, "measured", lambda: found)
    sweep.main(["--overhead", "--op", "matmul"])
    printed = capsys.readouterr().out
    assert "`matmul` | 2 | fwd | 1 | 2 |" in printed and "ema" not in printed
