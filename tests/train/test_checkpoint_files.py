"""Checkpoints that were damaged, or that somebody made to run code when they are resumed from."""

import json
import os
import pickle
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
from fastvlp_tests.run_state import last_state, same
from fastvlp_tests.tiny_run import train, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlp.train import checkpoint_files
from fastvlp.train.checkpoint_files import RefusedError

pytestmark = pytest.mark.usefixtures("quick_runs")
CHANGES = {"steps": 4, "save_every": 2}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with checkpoints after its second and fourth step."""
    folder = tmp_path_factory.mktemp("run") / "whole"
    train(folder, **CHANGES)
    return folder


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def checkpoint(run, step=4):
    return run / "checkpoints" / f"step-{step:08d}"


def flip(path, at, bit=0):
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


@settings(max_examples=30)
@given(data=st.data())
def test_every_flipped_bit_is_found(whole, data):
    path = data.draw(st.sampled_from(sorted(checkpoint(whole).iterdir())))
    content = path.read_bytes()
    at, bit = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7))
    try:
        flip(path, at, bit)
        assert checkpoint_files.damage(checkpoint(whole)) is not None
    finally:
        path.write_bytes(content)
    assert checkpoint_files.damage(checkpoint(whole)) is None


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(whole, run, capsys, tmp_path):
    file = checkpoint(run) / "__0_0.distcp"
    flip(file, file.stat().st_size // 2)
    train(run, **CHANGES)
    shown = capsys.readouterr().out.replace("\n", " ")
    assert f"step-00000004 ({file.name}: " in shown
    assert "going on from step-00000002" in shown
    assert {path.name for path in (run / "checkpoints").iterdir()} == {
        "step-00000002", "step-00000004", "step-00000004.damaged",
    }  # fmt: skip
    assert all(torch.equal(weights(run)[k], v) for k, v in weights(whole).items())
    assert same(last_state(whole, tmp_path), last_state_of(checkpoint(run), tmp_path))


def test_a_finished_run_removes_old_checkpoints_that_it_was_killed_before_removing(run):
    shutil.copytree(checkpoint(run, 2), checkpoint(run, 1))
    train(run, **CHANGES)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "step-00000002", "step-00000004",
    ]  # fmt: skip


def last_state_of(path, tmp_path):
    kept = tmp_path / "kept" / "checkpoints"
    shutil.copytree(path, kept / path.name)
    return last_state(kept.parent, tmp_path)


def test_a_description_that_cannot_be_read_is_damage_without_checksums_too(run):
    (checkpoint(run) / ".metadata").write_bytes(b"\x80\x04garbage")
    (checkpoint(run) / "checksums.json").unlink()
    assert checkpoint_files.unreadable(checkpoint(run)).startswith(".metadata: ")
    assert checkpoint_files.unreadable(checkpoint(run, 2)) is None


def test_files_that_were_cut_or_are_gone_are_found(run):
    file = checkpoint(run) / "__0_0.distcp"
    size = file.stat().st_size
    os.truncate(file, 1000)
    assert checkpoint_files.damage(checkpoint(run)).startswith(f"{file.name}: expected {size} b")
    file.unlink()
    assert checkpoint_files.damage(checkpoint(run)) == f"{file.name}: No such file or directory"


def test_a_run_of_damaged_checkpoints_only_does_not_begin_anew(run):
    for step in (2, 4):
        flip(checkpoint(run, step) / ".metadata", 100)
    with pytest.raises(ValueError, match="step-00000004 .*step-00000002 .*remove .* to begin"):
        train(run, **CHANGES)
    assert checkpoint(run, 4).exists() and checkpoint(run, 2).exists()


class Evil:
    """A pickle of it calls `os.mkdir`."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_description_that_would_run_code_is_refused_by_name(run, tmp_path):
    (checkpoint(run) / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    (checkpoint(run) / "checksums.json").unlink()
    assert checkpoint_files.damage(checkpoint(run)) is None
    checkpoint_files.write_checksums(checkpoint(run))
    with pytest.raises(RefusedError, match=r"got posix.mkdir in .*\.metadata"):
        train(run, **CHANGES)
    assert not (tmp_path / "ran").exists()


def test_a_value_that_would_run_code_is_refused_by_name(tmp_path):
    dcp.save({"loop": Evil(tmp_path / "ran")}, checkpoint_id=str(tmp_path / "c"))
    with pytest.raises(RefusedError, match="got posix.mkdir in loop"):
        checkpoint_files.load({"loop": ""}, tmp_path / "c", None)
    assert not (tmp_path / "ran").exists()


def test_plain_values_and_tensors_are_read(tmp_path):
    stored = {"loop": json.dumps({"step": 3}), "betas": (0.9, None), "w": torch.arange(4.0)}
    dcp.save(stored, checkpoint_id=str(tmp_path / "c"))
    state = {"loop": "", "betas": (), "w": torch.zeros(4)}
    checkpoint_files.load(state, tmp_path / "c", None)
    assert same(state, stored)


def test_a_description_that_leads_out_of_its_folder_is_refused(tmp_path):
    dcp.save({"w": torch.ones(2)}, checkpoint_id=str(tmp_path / "c"))
    found = checkpoint_files.description(tmp_path / "c")
    for place in found.storage_data.values():
        place.relative_path = "../elsewhere.distcp"
    (tmp_path / "c" / ".metadata").write_bytes(pickle.dumps(found))
    with pytest.raises(RefusedError, match=r"the file '../elsewhere.distcp'"):
        checkpoint_files.description(tmp_path / "c")


def test_weights_are_read_for_evaluation(whole):
    found, saved = checkpoint_files.read_weights(checkpoint(whole)), weights(whole)
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[name], value) for name, value in saved.items())


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for step in (99_999_999, 100_000_000, 5):
        (tmp_path / f"step-{step:08d}").mkdir()
    (tmp_path / "step-00000007.part").mkdir()
    found = [checkpoint_files.step_of(path) for path in checkpoint_files.steps(tmp_path)]
    assert found == [5, 99_999_999, 100_000_000]
