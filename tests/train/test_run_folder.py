"""A run's folder that is started again: with other settings, by two processes, finished or not."""

import dataclasses
import shutil

import filelock
import pytest
import torch
import yaml
from fastvlp_tests.tiny_pretraining import settings as pretraining
from fastvlp_tests.tiny_run import settings, train, weights

from fastvlp.commands.train import SYSTEMS
from fastvlp.train import parallel, run_folder
from fastvlp.train.config import TrainVilt

pytestmark = pytest.mark.usefixtures("quick_runs")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "finished"
    train(folder, steps=4)
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def compared(config):
    with parallel.ranks("cpu") as ranks:
        return run_folder.compare(config, ranks)


def test_other_settings_are_refused_by_name_and_change_nothing(run):
    before = (run / "config.yaml").read_text()
    with pytest.raises(ValueError, match="lr was 0.01, is 0.02, seed was 0, is 3. .* --config"):
        train(run, steps=4, lr=2e-2, seed=3)
    assert (run / "config.yaml").read_text() == before


# Another value of each setting: of those that may change when a run goes on, and of the others.
MAY_CHANGE = {
    "folder": "other", "steps": 77, "epochs": 7.5, "precision": "float16", "reference": True,
    "chunk_size": 2, "device": "cuda", "progress": True, "log_every": 7, "evaluate_every": 7,
    "log": "wandb",
    "eval_data": "other", "save_every": 7, "keep": 7, "resume": "never", "max_skipped": 7,
    "max_broken": 0.7, "parallel": "fsdp", "recompute": True, "compile": "inductor",
}  # fmt: skip
MAY_NOT = {
    "data": "other", "model": "other", "tokenizer": "other", "batch_size": 7, "lr": 0.7,
    "betas": [0.5, 0.6], "eps": 0.7, "weight_decay": 0.7, "clip_norm": 0.7, "schedule": "linear",
    "warmup": 7, "warmup_lr": 0.7, "final_lr": 0.7, "ema": 0.7, "seed": 7, "verify": "decode",
    "convert": "pillow", "background": "red", "model_config": "other", "init": "other",
    "activation": "gelu",
}  # fmt: skip

# What a setting needs beside it.
TOGETHER = {"init": {"model": None}, "activation": {"model": None, "init": "other"}}


def changed(run, **values):
    """As if the run had been begun with these."""
    stored = yaml.safe_load((run / "config.yaml").read_text())
    assert all(stored[name] != value for name, value in values.items())
    (run / "config.yaml").write_text(yaml.safe_dump(stored | values))


def test_every_setting_may_change_or_not():
    known = {field.name for field in dataclasses.fields(SYSTEMS["clip"])}
    assert known == MAY_CHANGE.keys() | MAY_NOT.keys()


@pytest.mark.parametrize("name", MAY_NOT)
def test_what_changes_what_is_learned_may_not_change(run, name):
    changed(run, **{name: MAY_NOT[name]}, **TOGETHER.get(name, {}))
    with pytest.raises(ValueError, match=f"holds a run with other settings: .*{name} was"):
        compared(settings(run, steps=4))


def test_what_changes_nothing_that_is_learned_may_change(run):
    changed(run, **MAY_CHANGE)
    assert len(compared(settings(run, steps=4))) == 5


def test_a_word_is_said_of_length_precision_and_chunks(run):
    said = compared(settings(run, steps=6, precision="bfloat16", chunk_size=2))
    assert [line.split(": ")[0] for line in said] == [
        "steps was 4, is 6", "chunk_size was None, is 2", "precision was float32, is bfloat16",
    ]  # fmt: skip
    assert compared(settings(run, steps=4, log_every=7, device="auto", keep=9)) == []


@pytest.mark.parametrize("system", ["vilt", "albef"])
def test_chunks_change_what_is_learned_where_pairs_meet_within_them(tmp_path, system):
    config = pretraining(tmp_path, system)
    assert "chunk_size" in config.learns_by
    (tmp_path / "checkpoints" / "step-00000002").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"epochs": 1.0, "chunk_size": 4}))
    with pytest.raises(ValueError, match="chunk_size was 4, is None"):
        compared(config)


def test_the_folder_of_another_system_is_refused(run):
    with pytest.raises(ValueError, match="holds a run of clip, not of vilt"):
        compared(TrainVilt(folder=run, steps=4))


def test_a_finished_run_says_so_and_takes_no_step(run, capsys):
    before = weights(run)
    train(run, steps=4)
    assert f"{run} is finished: all 4 steps are taken" in capsys.readouterr().out
    assert all(torch.equal(weights(run)[name], value) for name, value in before.items())


def test_a_longer_run_goes_on_and_a_shorter_one_is_refused(run, capsys):
    train(run, steps=5)
    shown = capsys.readouterr().out
    assert "resuming at step 4 of 5" in shown
    assert "steps was 4, is 5: the learning rate follows the schedule of the new length" in shown
    with pytest.raises(ValueError, match="steps: expected at least the 5 that the run in .* got 3"):
        train(run, steps=3)


def test_two_processes_do_not_share_a_folder(run):
    with filelock.FileLock(run / ".lock"):
        with pytest.raises(
            BlockingIOError, match="folder: another process is training in .*/run; "
        ):
            train(run, steps=6)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "step-00000002", "step-00000004",
    ]  # fmt: skip
    # The lock's file stays, the lock does not.
    with parallel.ranks("cpu") as ranks, run_folder.alone(run, ranks), run_folder.alone(run, ranks):
        with pytest.raises(filelock.Timeout):
            filelock.FileLock(run / ".lock", timeout=0).acquire()
    with filelock.FileLock(run / ".lock", timeout=0):
        pass


def test_a_description_of_a_run_that_is_damaged_is_named(run):
    (run / "run.json").write_text('{"model": ')
    with pytest.raises(ValueError, match="run.json: expected what `fastvlp train` writes, got Exp"):
        run_folder.unsaved(run)


def test_a_file_is_no_folder_of_a_run(tmp_path):
    (tmp_path / "file").write_text("")
    for place in ("file", "file/run"):
        with pytest.raises(ValueError, match="folder: expected a folder, got .*, which is a file"):
            train(tmp_path / place)
