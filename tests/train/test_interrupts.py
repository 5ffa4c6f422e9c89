"""Runs that are told to stop: the step is finished and saved, and the run goes on later."""

import os
import signal

import pytest
import torch
from fastvlp_tests import tiny_pretraining
from fastvlp_tests.tiny_run import MODEL, NoisyTask, train, weights

from fastvlp.train import checkpoint_files, parallel, run_folder
from fastvlp.train.checkpointing import Checkpoints
from fastvlp.train.interrupts import Interrupted, Interrupts
from fastvlp.train.parallel import Ranks

pytestmark = pytest.mark.usefixtures("quick_runs")
STOP = 3


class Signalled(NoisyTask):
    """Its process is sent a signal within step `STOP`."""

    signum, steps = signal.SIGINT, 0

    def after_step(self):
        super().after_step()
        self.steps += 1
        if self.steps == STOP and self.signum is not None:
            os.kill(os.getpid(), self.signum)


class Terminated(Signalled):
    signum = signal.SIGTERM


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    train(folder, steps=4)
    return weights(folder)


def names(folder):
    return [path.name for path in run_folder.checkpoints(folder)]


@pytest.mark.parametrize("kind", [Signalled, Terminated])
def test_a_run_that_is_told_to_stop_saves_its_step_and_goes_on_later(tmp_path, kind, whole, capfd):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="interrupted at step 3 of 4; the checkpoint is") as found:
        train(tmp_path, kind, steps=4, save_every=100)
    assert found.value.signum == kind.signum and isinstance(found.value, KeyboardInterrupt)
    assert names(tmp_path) == ["step-00000003"]
    assert "saving a checkpoint after this step" in capfd.readouterr().err
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    train(tmp_path, steps=4, save_every=100)
    assert "resuming at step 3 of 4" in capfd.readouterr().out
    assert all(torch.equal(weights(tmp_path)[name], value) for name, value in whole.items())


def test_a_signal_while_the_last_checkpoint_is_written_is_heeded(tmp_path, monkeypatch):
    def close(checkpoints, plain=Checkpoints.close):
        os.kill(os.getpid(), signal.SIGTERM)
        plain(checkpoints)

    monkeypatch.setattr(Checkpoints, "close", close)
    with pytest.raises(Interrupted, match="interrupted at step 2 of 2"):
        train(tmp_path, steps=2)
    assert names(tmp_path) == ["step-00000002"] and not (tmp_path / "model.json").exists()


def test_a_second_interrupt_stops_at_once_and_a_second_termination_does_not(tmp_path, monkeypatch):
    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    ranks = Ranks(0, 1, torch.device("cpu"), None)
    with Interrupts(Checkpoints(tmp_path, ranks), ranks):
        for signum in (signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), signum)
        assert left == []
        os.kill(os.getpid(), signal.SIGINT)
        assert left == [130]


def test_an_interrupted_run_is_evaluated_by_its_newest_whole_checkpoint(tmp_path):
    train(tmp_path, steps=2)
    assert run_folder.unsaved(tmp_path) is None
    assert run_folder.unsaved(tmp_path / "checkpoints") is None
    with pytest.raises(Interrupted):
        train(tmp_path, Signalled, steps=8, save_every=4)
    model, said = run_folder.unsaved(tmp_path)
    assert said == f"{tmp_path}: its run did not end; taking the checkpoint step-00000005"
    assert not model.training and model.config == MODEL
    newest = tmp_path / "checkpoints" / "step-00000005"
    # The average, which is what the run evaluates and saves.
    stored = checkpoint_files.read_weights(newest)
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())
    (newest / "__0_0.distcp").write_bytes(b"")
    _, said = run_folder.unsaved(tmp_path)
    assert "step-00000005 is damaged (__0_0.distcp: " in said
    assert said.endswith("taking the checkpoint step-00000004")


def test_albef_is_evaluated_from_a_checkpoint_as_well(tmp_path):
    scores, task = tiny_pretraining.fit(tmp_path, "albef", steps=2)
    config = tiny_pretraining.settings(tmp_path, "albef")
    run_folder.begin(config, task.model, resumed=False)
    model, _ = run_folder.unsaved(tmp_path)
    with parallel.ranks("cpu") as ranks:
        found, _ = tiny_pretraining.build(config, ranks)
        assert found.evaluate(model) == scores
