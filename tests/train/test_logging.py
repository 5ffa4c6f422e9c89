"""What a run prints, with a terminal and without, and the names of its scores."""

import json
import os
import pty
import sys
from types import SimpleNamespace

import pytest
import torch
from fastvlp_tests.terminals import written_to

from fastvlp.train.logging import Log, read_log
from fastvlp.train.loop import Report
from fastvlp.train.parallel import Ranks

pytestmark = pytest.mark.usefixtures("quick_runs")
ALONE = Ranks(0, 1, torch.device("cpu"), None)


def loop(step=0, steps=4):
    return SimpleNamespace(
        step=step, steps=steps, skipped=0, empty=0, scale=SimpleNamespace(enabled=False),
        task=SimpleNamespace(metrics=lambda: {"temperature": 0.0}),
    )  # fmt: skip


def report(loss=2.5):
    return Report({"loss": torch.tensor(loss)}, lr=1e-3, norm=0.5, taken=True, pairs=8)


def steps(folder, ranks=ALONE, progress=True):
    """Four steps, an evaluation after the second and one after the last."""
    run = loop()
    with Log(folder, ranks, every=1, progress=progress) as log:
        log.start(run)
        for _ in range(run.steps):
            run.step += 1
            log(run, report())
            if run.step % 2 == 0:
                log.evaluation(run.step, {"eval/R@1": 0.0, "held_out/R@5": 0.25})
        log.finish(["the end"])
    return run


@pytest.mark.parametrize("progress", [True, False])
def test_lines_take_the_bars_place_without_a_terminal(tmp_path, progress, capsys):
    steps(tmp_path, progress=progress)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 1/4  loss 2.5  lr 0.001  ")
    assert " pairs/s  temperature 0  gradient_norm 0.5" in lines[0]
    assert lines[2:4] == ["step 2/4  eval  R@1 0", "step 2/4  held_out  R@5 0.25"]
    assert lines[-2].startswith("time      4 steps and evaluation in ") and lines[-1] == "the end"
    assert lines[6:-2] == [
        "scores       R@1", "eval      0.0000", "", "scores       R@5", "held_out  0.2500",
    ]  # fmt: skip
    assert all(len(line) <= 80 and "\x1b" not in line for line in lines)


def test_a_missing_library_is_the_error_that_is_seen(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with pytest.raises(ImportError, match="rich"), Log(tmp_path, ALONE) as log:
        log.start(loop())


def test_each_line_is_out_before_the_next_step(tmp_path, monkeypatch):
    read, write = os.pipe()
    with os.fdopen(write, "w", buffering=1 << 16) as out, os.fdopen(read, "rb", 0) as found:
        monkeypatch.setattr("sys.stdout", out)
        run = loop()
        with Log(tmp_path, ALONE, every=1) as log:
            log.start(run)
            run.step = 1
            log(run, report())
            os.set_blocking(read, False)
            assert found.read().startswith(b"step 1/4  loss 2.5")


def test_a_terminal_has_a_bar_and_evaluations_above_it(tmp_path, monkeypatch):
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr("sys.stdout", terminal)
        monkeypatch.setenv("TERM", "xterm")
        steps(tmp_path)
    shown = written_to(master)
    os.close(master)
    assert "\x1b[" in shown and "step 2/4  eval  R@1 0" in shown and "step 1/4  loss" not in shown
    # What is said at the end stands below the bar.
    end = shown[shown.rindex("━") :]
    assert "scores" in end and "the end" in end and "step 2/4" not in end


def test_other_ranks_print_nothing(tmp_path, capsys):
    steps(tmp_path, ranks=Ranks(1, 2, torch.device("cpu"), None))
    assert capsys.readouterr().out == "" and list(tmp_path.iterdir()) == []


def test_scores_are_logged_under_one_name(tmp_path):
    steps(tmp_path)
    evaluated = [row for row in read_log(tmp_path) if "loss" not in row]
    assert evaluated == [
        {"step": step, "eval/R@1": 0.0, "eval/held_out/R@5": 0.25} for step in (2, 4)
    ]
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])["skipped"] == 0


@pytest.mark.parametrize(
    ("step", "said"), [(0, []), (3, ["resuming at step 3 of 4"]), (4, ["is finished: all 4 steps"])]
)
def test_it_says_where_the_run_stands(tmp_path, step, said, capsys):
    with Log(tmp_path, ALONE) as log:
        log.start(loop(step), ["lr was 1, is 2"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(said) + 1 and lines[-1] == "lr was 1, is 2"
    assert all(text in lines[0] for text in said)
