"""bench/_harness/run.py: every benchmark shows and keeps a comparison before the next one."""

import importlib
import io
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from _harness import measure, run

BENCH = Path(__file__).parents[2] / "bench"
SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture
def waiting(tmp_path):
    """A benchmark whose standard output is a pipe, waiting after its first comparison."""
    target = tmp_path / "new" / "found.json"
    command = [sys.executable, "-m", "fastvlp_tests.waiting_bench", "--quick", "--json", target]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(BENCH), str(SUPPORT)))},
        # Shells make what they run in the background ignore Ctrl-C, and children inherit that.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    process.target = target
    yield process
    process.kill()
    process.communicate()


def first_table(process):
    """What is printed up to the note under the first table."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "the sum alone" in line:
            return "".join(lines)
    raise AssertionError(process.stderr.read())


def test_tables_and_progress_reach_a_pipe_before_the_run_ends(waiting):
    assert "double fwd+bwd, fp32, n=8" in first_table(waiting)
    assert waiting.poll() is None
    out, err = waiting.communicate("\n\n")
    assert waiting.returncode == 0
    assert "n=16" in out and out.endswith("4 rows in all\n")
    for step in ("n=8: warming up floor", "n=16: float64 reference"):
        assert sum(step in line for line in err.splitlines()) == 1
    found = json.loads(waiting.target.read_text())
    assert found["meta"]["complete"] is True and len(found["rows"]) == 4


def test_ctrl_c_keeps_what_was_measured(waiting):
    first_table(waiting)
    waiting.send_signal(signal.SIGINT)
    out, _ = waiting.communicate()
    assert waiting.returncode == 130
    found = json.loads(waiting.target.read_text())
    assert found["meta"]["complete"] is False
    assert [(row["impl"], row["shape"]) for row in found["rows"]] == [
        ("fastvlp", {"n": 8}),
        ("floor", {"n": 8}),
    ]
    assert f"Interrupted after 1 comparison, kept in {waiting.target}" in out
    assert list(waiting.target.parent.iterdir()) == [waiting.target]


def parsed(*flags):
    return measure.parser("a benchmark").parse_args(["--quick", *map(str, flags)])


def test_ctrl_c_before_the_first_comparison_leaves_an_earlier_file(tmp_path):
    target = tmp_path / "found.json"
    target.write_text("earlier")
    with pytest.raises(SystemExit, match="130"), run.Run(parsed("--json", target)):
        raise KeyboardInterrupt
    assert target.read_text() == "earlier"


def test_the_plot_is_drawn_as_rows_come(tmp_path):
    target = tmp_path / "found.png"
    implementation = measure.Implementation("fastvlp", None)
    with run.Run(parsed("--plot", target), axis=("n", "size")) as found:
        for n in (1, 2):
            found.add([measure.row("op", implementation, "fp32", {"n": n}, "fwd", [n], None)])
            assert target.read_bytes().startswith(b"\x89PNG")
            target.unlink()
    assert target.exists()


def test_an_error_keeps_what_was_measured_and_is_raised(tmp_path):
    target = tmp_path / "found.json"
    implementation = measure.Implementation("fastvlp", None)
    row = measure.row("op", implementation, "fp32", {"n": 1}, "fwd", [1.0], None)
    with pytest.raises(RuntimeError, match="lost"), run.Run(parsed("--json", target)) as found:
        found.add([row], [measure.Missing("peer", "none")])
        raise RuntimeError("lost")
    kept = json.loads(target.read_text())
    assert kept["rows"] == [row] and kept["meta"]["missing"][0]["name"] == "peer"


def test_a_plot_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="draws nothing"):
        run.Run(parsed("--plot", tmp_path / "x.png"))


@pytest.mark.parametrize(
    ("flags", "compiled", "memory"),
    [([], True, True), (["--quick"], False, True), (["--no-compile"], False, True),
     (["--no-memory"], True, False)],
)  # fmt: skip
def test_flags_leave_out_compiled_implementations_and_memory(monkeypatch, flags, compiled, memory):
    asked = []

    def compare(op, implementations, *_, measure_memory, **options):
        asked.append(([each.name for each in implementations], measure_memory))
        return fake_rows(op, implementations, None, None, None, **options)

    monkeypatch.setattr(measure, "compare", compare)
    parser = measure.parser("a benchmark")
    measure.add_omissions(parser, compiled=True)
    both = [measure.Implementation(measure.OURS, None),
            measure.Implementation("peer compiled", None, compiled=True)]  # fmt: skip
    absent = [measure.Missing("other", "not installed")]
    with run.Run(parser.parse_args(flags)) as found:
        found.compare("op", both, None, None, missing=absent, dtype="fp32", shape={"n": 1})
    names = [measure.OURS, "peer compiled"][: 1 + compiled]
    assert asked == [(names, memory)] and [row["impl"] for row in found.rows] == names
    left_out = [] if compiled else ["torch.compile"]
    assert [each.name for each in found.missing] == [*left_out, "other"]


def fake_rows(op, implementations, _build, _tiny, _settings, *, dtype, shape, phase="fwd+bwd", **_):
    return [
        measure.row(
            op, each, dtype, shape, phase, [1.0, 2.0], None if each.bound else 3.0,
            None if each.bound else {"result": 1e-6},
        )
        for each in implementations
    ], []  # fmt: skip


TINY_ATTENTION = ["--images", "1", "--heads", "1", "--dim", "8", "--keys", "8", "--no-compile"]
# Flags that make at least two comparisons of each benchmark without measuring anything else.
COMPARING = {
    "cross_attention": ["--queries", "3,4", "--part", "cross", *TINY_ATTENTION],
    "cross_attention --layer": ["--layer", *TINY_ATTENTION],
    "ema": ["--phase", "step+copy", "adamw", "--blocks", "0"],
    "itc_throughput": ["--features", "random", "--n", "8,16", "--memory-n", ""],
    "matmul": ["--layers", "8x8"],
    "momentum_contrastive": [],
    "soft_cross_entropy": [],
    "train_step": ["--parts", "0", "--model", "clip"],
    "word_patch_alignment": ["--layers", "0"],
}


class Pipe(io.RawIOBase):
    """Keeps what reaches it, which of a buffered stream is what was flushed."""

    def __init__(self):
        self.text = ""

    def writable(self):
        return True

    def write(self, data):
        self.text += bytes(data).decode()
        return len(data)


@pytest.fixture
def watched(monkeypatch, tmp_path):
    """watched(module, name, fake): `module.name` replaced by `fake`, which finds at each call that
    all its earlier rows have been printed and kept. Gives the rows of each call, the file of rows
    and standard output."""
    target, pipe = tmp_path / "found.json", Pipe()

    def watch(module, name, fake, group=lambda found: found[0], shown="impl"):
        # Not in the fixture's own phase, after which pytest captures anew.
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(pipe, 1 << 20)))
        calls = []

        def checked(*args, **kwargs):
            if calls:
                kept = json.loads(target.read_text())
                assert kept["rows"] == [row for rows in calls for row in rows]
                assert kept["meta"]["complete"] is False
                assert all(row[shown] in pipe.text for row in calls[-1])
            found = fake(*args, **kwargs)
            calls.append(group(found))
            return found

        monkeypatch.setattr(module, name, checked)
        return calls, target, pipe

    return watch


@pytest.mark.parametrize("script", COMPARING)
def test_each_comparison_is_printed_and_kept_at_once(script, watched):
    module = importlib.import_module(script.split()[0])
    calls, target, pipe = watched(measure, "compare", fake_rows)
    module.main(["--threads", str(torch.get_num_threads()), "--json", str(target),
                 *COMPARING[script]])  # fmt: skip
    assert len(calls) >= 2
    assert json.loads(target.read_text())["meta"]["complete"] is True
    floors = [row for rows in calls for row in rows if row["impl"].startswith(measure.BOUND)]
    for row in floors:
        assert f"{row['impl']}: " in pipe.text and row["note"].split()[0] in pipe.text


def test_each_recipe_of_the_loader_is_printed_and_kept_at_once(watched, monkeypatch):
    import loader

    def measured(name, data, settings):
        shape = {"images": 1, "batch": 1}
        implementation = measure.Implementation("fastvlp", None, extra={"cpu_ms": 1.0})
        return [measure.row("loader", implementation, "uint8", shape, name, [1.0], None)], []

    monkeypatch.setattr(loader, "photographs", lambda count: [])
    calls, target, _ = watched(loader, "measured", measured)
    loader.main(["--quick", "--threads", str(torch.get_num_threads()), "--json", str(target)])
    assert len(calls) == len(loader.QUICK)


def test_each_number_of_ranks_is_printed_and_kept_at_once(watched):
    import itc_distributed

    def compare(job):
        counts = {"softmax": "fp32", "flops": 1e9, "bytes_sent": 1000}
        implementation = measure.Implementation("fastvlp", None, extra=counts)
        return [
            measure.row("ranks", implementation, job.dtype, job.shape, "fwd+bwd", [1.0], None)
        ], []

    calls, target, _ = watched(itc_distributed, "compare", compare)
    itc_distributed.main(["--world-sizes", "1,2", "--json", str(target)])
    assert len(calls) == 4


def test_each_curve_is_printed_and_kept_at_once(watched, monkeypatch):
    import train_curves

    monkeypatch.setattr(train_curves, "curve", lambda *_: [2.0, 1.0])
    calls, target, _ = watched(
        train_curves, "measure_curve", train_curves.measure_curve, lambda rows: rows, "op"
    )
    train_curves.main(["--threads", str(torch.get_num_threads()), "--json", str(target)])
    assert len(calls) == len(train_curves.SYSTEMS)
