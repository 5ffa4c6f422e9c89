"""A run that was killed at any moment and resumed ends with the weights of one that was not."""

import signal

import pytest
import torch
from fastvlp_tests.killed_runs import kill_and_resume
from fastvlp_tests.run_state import last_state, same
from fastvlp_tests.tiny_run import weights

from fastvlp.train.logging import read_log

pytestmark = pytest.mark.thorough
BY_TIME, BY_EVENT = 7, 13


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    return folder, kill_and_resume(folder, BY_TIME, BY_EVENT)


def test_the_runs_were_killed_and_then_ended(runs):
    _, found = runs
    by_event = [code for name, code in found["killed"].items() if name.startswith("event")]
    assert set(by_event) == {-signal.SIGKILL}
    # A run that was faster than the first one may have ended before its time.
    by_time = [code for name, code in found["killed"].items() if name.startswith("time")]
    assert by_time.count(-signal.SIGKILL) >= BY_TIME - 2
    assert set(found["resumed"].values()) == {0}


def test_weights_are_those_of_the_whole_run_to_the_bit(runs):
    folder, found = runs
    whole = weights(folder / "whole")
    assert whole
    for name in found["killed"]:
        ours = weights(folder / name)
        assert ours.keys() == whole.keys()
        assert [k for k in whole if not torch.equal(ours[k], whole[k])] == [], name


def test_the_whole_state_is_that_of_the_whole_run(runs, tmp_path):
    folder, found = runs
    whole = last_state(folder / "whole", tmp_path)
    assert {"model", "optimizer", "ema", "loop", "random-0-of-1"} <= whole.keys()
    for name in found["killed"]:
        assert same(last_state(folder / name, tmp_path), whole), name


def test_logs_are_without_gaps_and_repeats(runs):
    folder, found = runs
    for name in ["whole", *found["killed"]]:
        rows = [row for row in read_log(folder / name) if "loss" in row]
        assert [row["step"] for row in rows] == list(range(1, 9)), name
    losses = [row["loss"] for row in read_log(folder / "whole") if "loss" in row]
    assert losses == [row["loss"] for row in read_log(folder / name) if "loss" in row]


def test_two_checkpoints_and_no_part_of_one_are_left(runs):
    folder, found = runs
    for name in found["killed"]:
        left = sorted(path.name for path in (folder / name / "checkpoints").iterdir())
        assert left == ["step-00000006", "step-00000008"], name
