import functools
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from _harness import measure, memory, report, table, timing

SETTINGS = measure.Settings(threads=1, quick=True, min_rounds=2, max_rounds=2, budget_s=0.0)


# Implementations go to another process to have their memory measured, so they live at module level.
def matrix(n: int = 8) -> torch.Tensor:
    return torch.eye(n)


def doubled(offset, inputs):
    return lambda: {"twice": inputs * 2 + offset}


def broken(inputs):
    raise RuntimeError("no such device\nsecond line")


def silent(inputs):
    return lambda: None


def ones(sizes_mb, keep, inputs):
    """Touches blocks of so many MB one after the other, kept or dropped."""

    def call():
        blocks = []
        for size in sizes_mb:
            block = torch.ones(size * 250_000)
            if keep:
                blocks.append(block)
            del block
        return blocks

    return call


def dies(inputs):
    return lambda: os._exit(7)


def peak(make, build=matrix):
    return memory.extra_peak(make, build, matrix, threads=1)


def reference(inputs):
    return {"twice": inputs.double() * 2}


def compare(implementations, **changes):
    arguments = {
        "dtype": "fp32",
        "shape": {"n": 8},
        "measure_memory": False,
        "reference": reference,
        **changes,
    }
    return measure.compare("twice", implementations, matrix, matrix, SETTINGS, **arguments)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_implementations_take_turns_in_orders_that_runs_have_in_common(count):
    names = "abc"[:count]

    def run():
        seen = []
        calls = {name: functools.partial(seen.append, name) for name in names}
        times = timing.alternate(calls, min_rounds=30, max_rounds=30, budget_s=0.0)
        assert [len(times[name]) for name in names] == [30] * count
        return ["".join(seen[i : i + count]) for i in range(0, len(seen), count)]

    rounds = run()
    assert all(sorted(each) == list(names) for each in rounds)
    assert len(set(rounds)) == math.factorial(count)
    assert rounds == run()


@pytest.mark.parametrize("budget_s, rounds", [(0.0, 2), (5.0, 2), (6.5, 3), (100.0, 8)])
def test_rounds_go_on_while_the_budget_lasts(monkeypatch, budget_s, rounds):
    now = [0.0]

    def call():
        now[0] += 1.0

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    calls = {"one": call, "other": call}
    times = timing.alternate(calls, min_rounds=2, max_rounds=8, budget_s=budget_s)
    assert times == {"one": [1000.0] * rounds, "other": [1000.0] * rounds}


def test_a_row_has_the_median_the_quartiles_and_every_field():
    row = measure.row(
        "op",
        measure.Implementation("peer", silent, extra={"softmax": "fp32"}),
        "bf16",
        {"n": 4},
        "fwd",
        [1.0, 2.0, 3.0, 4.0, 100.0],
        7.0,
        {"loss": 0.1, "grad": 0.3, "scale": 0.9},
        ("loss", "grad"),
    )
    assert row == {
        "op": "op",
        "impl": "peer",
        "dtype": "bf16",
        "shape": {"n": 4},
        "phase": "fwd",
        "ms": 3.0,
        "ms_q1": 2.0,
        "ms_q3": 4.0,
        "rounds": 5,
        "peak_mb": 7.0,
        "error": 0.3,
        "errors": {"loss": 0.1, "grad": 0.3, "scale": 0.9},
        "softmax": "fp32",
    }


def test_a_bound_says_what_it_computes():
    with pytest.raises(ValueError, match="bound 'floor': expected a note"):
        measure.Implementation("floor", silent, bound=True)


def test_a_nan_is_the_largest_error():
    implementation = measure.Implementation("peer", silent)
    errors = {"loss": 0.1, "grad": math.nan, "scale": 0.2}
    assert math.isnan(
        measure.row("op", implementation, "fp32", {}, "fwd", [1.0], None, errors)["error"]
    )


def test_relative_error_is_of_frobenius_norms():
    truth = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert measure.relative_error(torch.tensor([3.0, 4.5]), truth) == pytest.approx(0.1)
    assert measure.relative_error(torch.tensor([0.5]), torch.zeros(1)) == 0.5
    with pytest.raises(ValueError, match="shape"):
        measure.relative_error(torch.ones(1, 2), truth)


def test_compare_measures_each_implementation_against_the_reference():
    rows, missing = compare(
        [
            measure.Implementation("fastvlp", functools.partial(doubled, 0)),
            measure.Implementation("off", functools.partial(doubled, 1)),
            measure.Implementation("floor", silent, bound=True, note="nothing"),
        ]
    )
    assert not missing
    errors = {row["impl"]: row["error"] for row in rows}
    # ‖1‖ over 8 x 8 entries is 8, and ‖2·I‖ is 2·√8.
    assert errors == {"fastvlp": 0.0, "off": pytest.approx(8 / math.sqrt(32)), "floor": None}
    assert all(row["ms"] > 0 and row["rounds"] == 2 for row in rows)
    if os.path.exists("/proc/stat"):
        assert all(0 <= row["neighbours"] <= 1.1 for row in rows)


def test_work_of_other_processes_is_told_from_ours(monkeypatch):
    readings = iter([(0.0, 0.0, 100.0), (10.0, 12.0, 117.0)])
    monkeypatch.setattr(timing.Neighbours, "_read", staticmethod(lambda: next(readings)))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    with timing.Neighbours() as neighbours:
        pass
    assert neighbours.share == 0.25
    unread = iter([(0.0, 0.0, math.nan), (1.0, 1.0, math.nan)])
    monkeypatch.setattr(timing.Neighbours, "_read", staticmethod(lambda: next(unread)))
    with timing.Neighbours() as neighbours:
        pass
    assert neighbours.share is None


def test_no_tick_of_the_clock_is_no_neighbour(monkeypatch):
    readings = iter([(0.0, 0.0, 5.0), (0.004, 0.003, 5.0)])
    monkeypatch.setattr(timing.Neighbours, "_read", staticmethod(lambda: next(readings)))
    with timing.Neighbours() as neighbours:
        pass
    assert neighbours.share == 0.0


def test_a_peer_that_fails_is_named_and_ours_must_not():
    ours = measure.Implementation("fastvlp", functools.partial(doubled, 0))
    rows, missing = compare([ours, measure.Implementation("peer", broken)])
    assert [row["impl"] for row in rows] == ["fastvlp"]
    assert [str(each) for each in missing] == ["peer: RuntimeError: no such device"]
    with pytest.raises(RuntimeError, match="no such device"):
        compare([measure.Implementation("fastvlp", broken)])
    with pytest.raises(ValueError, match="must return"):
        compare([measure.Implementation("fastvlp", silent)])


def test_compare_measures_memory_in_another_process():
    implementation = measure.Implementation("fastvlp", functools.partial(ones, [40], True))
    rows, missing = compare([implementation], reference=None, measure_memory=True)
    assert not missing
    assert rows[0]["peak_mb"] == pytest.approx(40, rel=0.05)


@pytest.mark.parametrize(
    "sizes, keep, expected",
    [
        pytest.param([200], True, 200, id="one block"),
        pytest.param([16] * 10, True, 160, id="blocks of a heap's size, kept"),
        pytest.param([16] * 10, False, 16, id="blocks of a heap's size, dropped"),
        pytest.param([120, 80], False, 120, id="the highest point, not the last"),
    ],
)
def test_the_memory_probe_sees_a_known_allocation(sizes, keep, expected):
    probe = peak(functools.partial(ones, sizes, keep))
    assert not probe.failure
    assert probe.peak_mb == pytest.approx(expected, rel=0.05)
    assert probe.ms > 0


def test_inputs_are_not_extra_memory():
    probe = peak(functools.partial(ones, [50], True), functools.partial(matrix, 6000))
    assert probe.peak_mb == pytest.approx(50, rel=0.05)


def test_a_process_that_dies_or_raises_says_so():
    assert "exit code 7" in peak(dies).failure
    probe = peak(broken)
    assert probe.peak_mb is None and "no such device" in probe.failure


def test_ratios_are_to_ours_within_one_comparison():
    rows = [
        {"op": "o", "impl": impl, "dtype": dtype, "shape": {"n": n}, "phase": "fwd", "ms": ms}
        for impl, dtype, n, ms in [
            ("fastvlp", "fp32", 8, 2.0),
            ("fastvlp", "bf16", 8, 1.0),
            ("fastvlp", "fp32", 4, 8.0),
            ("peer", "bf16", 8, 3.0),
            ("peer", "fp32", 8, 5.0),
        ]
    ]
    groups = report.groups(rows)
    assert [[row["ms"] for row in group] for group in groups] == [[2.0, 5.0], [1.0, 3.0], [8.0]]
    assert [table.ratio(group, group[-1]) for group in groups] == [2.5, 3.0, 1.0]


def test_a_commit_is_marked_where_more_than_results_changed(tmp_path, monkeypatch):
    def git(*command):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(("git", *identity, *command), cwd=tmp_path, check=True, capture_output=True)

    monkeypatch.setattr(report, "ROOT", tmp_path)
    code, result = tmp_path / "code.py", tmp_path / "bench" / "results" / "found.json"
    result.parent.mkdir(parents=True)
    for path in (code, result):
        path.write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "a")
    commit = report._git_commit()
    assert len(commit) == 12
    result.write_text("2")
    (result.parent / "new.json").write_text("3")
    assert report._git_commit() == commit
    code.write_text("2")
    assert report._git_commit() == f"{commit}-dirty"
    monkeypatch.setattr(report, "ROOT", tmp_path / "nowhere")
    assert report._git_commit() is None


def test_json_and_plot_hold_what_was_measured(tmp_path):
    implementations = [
        measure.Implementation("fastvlp", functools.partial(doubled, 0)),
        measure.Implementation("peer", functools.partial(doubled, 0)),
    ]
    rows = [row for n in (8, 16) for row in compare(implementations, shape={"n": n})[0]]
    facts = report.meta(SETTINGS, ("numpy",)) | {"note": "hello"}
    report.write_json(tmp_path / "x.json", facts, rows)
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["rows"] == rows
    meta = found["meta"]
    assert meta["versions"]["torch"] == report.version("torch")
    assert meta["note"] == "hello" and meta["threads"] == 1 and meta["cpu"] and meta["date"]

    report.plot(tmp_path / "x.png", rows, facts, "n", "pairs N")
    from matplotlib import image

    pixels = torch.from_numpy(image.imread(tmp_path / "x.png"))[..., :3]
    ours = torch.tensor([0xD5, 0x5E, 0x00]) / 255
    assert ((pixels - ours).abs().amax(-1) < 0.01).sum() > 500


def test_help_says_each_default_once_and_what_is_accepted():
    flags = measure.parser("A benchmark.")
    measure.add_dtypes(flags)
    flags.add_argument("--n", type=measure.integers(2), help="pairs (default 8; 4 if quick)")
    flags.add_argument("--dim", type=int, default=512, help="width")
    text = " ".join(flags.format_help().split())
    for expected in (
        "--dtype DTYPE,... fp32, bf16, fp16 (default fp32,bf16)",
        "--n N,... pairs (default 8; 4 if quick) --",
        "--dim DIM width (default 512)",
        "--threads THREADS CPU threads; 0: torch's choice --",
        "--quick small sizes, under 40 seconds --",
    ):
        assert expected in f"{text} --"
    assert "None" not in text and "False" not in text


def test_meta_keeps_the_command_without_the_files_it_writes(monkeypatch):
    script = str(report.ROOT / "bench" / "ema.py")
    typed = ["--threads", "2", "--json", "x.json", "--plot=x.png", "--phase", "step+copy"]
    monkeypatch.setattr(sys, "argv", [script, *typed])
    found = report.meta(SETTINGS, ())["command"]
    assert found == "python bench/ema.py --threads 2 --phase step+copy"
    monkeypatch.setattr(sys, "argv", ["pytest", "--json", "x"])
    assert report.meta(SETTINGS, ())["command"] is None


def test_the_table_names_everything(capsys):
    rows, _ = compare(
        [
            measure.Implementation("fastvlp", functools.partial(doubled, 0)),
            measure.Implementation(
                "a rather long name of a peer", silent, bound=True, note="a sum"
            ),
        ]
    )
    table.table([row | {"neighbours": 0.0} for row in rows], rate=("items/s", "n"))
    printed = capsys.readouterr().out
    assert "Other processes" not in printed
    table.table([row | {"neighbours": 0.4} for row in rows])
    assert "Other processes took 40%" in capsys.readouterr().out
    for text in (
        "twice fwd+bwd, fp32, n=8",
        "a rather long name of a peer: a sum.",
        "items/s",
        "0.0e+00",
    ):
        assert text in printed


def test_types_of_flags(capsys):
    flags = measure.parser("a benchmark")
    flags.add_argument("--dtype", type=measure.dtypes)
    flags.add_argument("--n", type=measure.positives)
    flags.add_argument("--more", type=measure.integers(2, may_be_empty=True))
    found = flags.parse_args(["--dtype", "fp32, bf16", "--n", "1,20,", "--more", ""])
    assert (found.dtype, found.n, found.more) == (["fp32", "bf16"], [1, 20], [])
    for bad in ("--dtype=int8", "--dtype=", "--n=0,1", "--n=two", "--n=", "--more=1,4"):
        with pytest.raises(SystemExit):
            flags.parse_args([bad])
        assert f"argument {bad.split('=')[0]}: " in capsys.readouterr().err


def test_settings_are_those_of_the_flags():
    flags = measure.parser("a benchmark")
    quick = measure.settings_from(flags.parse_args(["--quick"]))
    assert (quick.min_rounds, quick.max_rounds, quick.budget_s) == (3, 5, 2.0)
    assert measure.settings_from(flags.parse_args(["--quick", "--rounds", "9"])).max_rounds == 9
    for threads in (1, 2):
        found = measure.settings_from(flags.parse_args(["--threads", str(threads)]))
        assert found.threads == torch.get_num_threads() == threads


def test_flags_are_checked():
    flags = measure.parser("a benchmark")
    with pytest.raises(SystemExit, match="positive"):
        measure.settings_from(flags.parse_args(["--threads", "-1"]))
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="no CUDA device"):
            measure.settings_from(flags.parse_args(["--device", "cuda"]))
