"""A killed and resumed ALBEF run ends with the momentum encoder and the queues of one that was not
killed."""

import signal

import pytest
import torch
from fastvlp_tests.killed_runs import kill_and_resume
from fastvlp_tests.run_state import last_state, same
from fastvlp_tests.tiny_run import weights

pytestmark = pytest.mark.thorough
BY_TIME, BY_EVENT = 3, 5


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    return folder, kill_and_resume(folder, BY_TIME, BY_EVENT, "tiny_pretraining")


def test_the_runs_were_killed_and_then_ended(runs):
    _, found = runs
    by_event = [code for name, code in found["killed"].items() if name.startswith("event")]
    assert set(by_event) == {-signal.SIGKILL}
    assert set(found["resumed"].values()) == {0}


def test_momentum_encoder_queues_and_all_else_are_those_of_the_whole_run(runs, tmp_path):
    folder, found = runs
    whole = last_state(folder / "whole", tmp_path)
    assert int(whole["model"]["momentum._extra_state"]) == 8
    assert int(whole["model"]["queue.position"]) == 8 * 8 % 20
    assert any(name.startswith("momentum.module.") for name in whole["model"])
    for name in found["killed"]:
        assert same(last_state(folder / name, tmp_path), whole), name


def test_saved_weights_are_those_of_the_whole_run(runs):
    folder, found = runs
    whole = weights(folder / "whole")
    assert not [name for name in whole if name.startswith(("momentum.", "queue."))]
    for name in found["killed"]:
        ours = weights(folder / name)
        assert ours.keys() == whole.keys()
        assert [k for k in whole if not torch.equal(ours[k], whole[k])] == [], name
