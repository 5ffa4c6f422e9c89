"""Whole runs on two ranks, by DDP and by FSDP2, and resumed on another number of ranks."""

import contextlib
import json
import os
import signal

import filelock
import pytest
import torch
import torch.distributed as dist
from fastvlp_tests import gloo_ranks
from fastvlp_tests.tiny_run import PlainTask, train, weights
from fastvlp_tests.tolerance import assert_as_accurate, epsilon

from fastvlp.train import run_folder
from fastvlp.train.interrupts import Interrupted
from fastvlp.train.logging import read_log

pytestmark = pytest.mark.usefixtures("quick_runs")
KINDS = {
    "ddp": {"parallel": "ddp"},
    "ddp in chunks": {"parallel": "ddp", "chunk_size": 3},
    "fsdp": {"parallel": "fsdp"},
    "fsdp in chunks": {"parallel": "fsdp", "chunk_size": 2, "recompute": True},
}
# Adam divides by gradients; a large eps keeps rounding errors from growing.
COMMON = {"eps": 1e-2, "clip_norm": 0.5, "save_every": 4}


def every_kind(rank, folder):
    found = {}
    for name, changes in KINDS.items():
        found[name], _ = train(folder / name, PlainTask, **COMMON, **changes)
    # The first four steps of these runs are two ranks'; the rest is done again by one.
    found["interrupted"] = interrupted(folder / "interrupted")
    return found | {"locked": locked(rank, folder / "locked")}


class SignalledOnce(PlainTask):
    """Its second rank is told to stop within the third step."""

    taken = 0

    def after_step(self):
        super().after_step()
        self.taken += 1
        if self.taken == 3 and self.ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def locked(rank, folder):
    """What each rank is told where another process, here of the first rank, is in the folder."""
    folder.mkdir(exist_ok=True)
    with filelock.FileLock(folder / ".lock") if rank == 0 else contextlib.nullcontext():
        dist.barrier()
        with pytest.raises(BlockingIOError) as refused:
            train(folder, PlainTask)
        return str(refused.value)


def interrupted(folder):
    with pytest.raises(Interrupted) as stopped:
        train(folder, SignalledOnce, save_every=100)
    return stopped.value.signum, [path.name for path in run_folder.checkpoints(folder)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, quick_runs):
    folder = tmp_path_factory.mktemp("ranks")
    found = gloo_ranks.run(2, every_kind, folder)
    assert all(isinstance(scores, dict) for scores in found), found
    scores, _ = train(folder / "one", PlainTask, **COMMON)
    train(folder / "wide", PlainTask, torch.float64, **COMMON)
    return folder, found, scores


def assert_same_weights(ours, folder):
    eager, exact = weights(folder / "one"), weights(folder / "wide")
    assert ours.keys() == exact.keys()
    for name, value in exact.items():
        # Eight steps of the rounding of one.
        floor = 8 * epsilon(torch.float32) * max(value.norm().item(), 1e-2)
        assert_as_accurate(name, ours[name], eager[name], value, floor)


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_train_what_one_does(runs, kind):
    folder, _, _ = runs
    assert_same_weights(weights(folder / kind), folder)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_equal_on_all_ranks_and_those_of_one(runs, kind):
    _, found, scores = runs
    assert found[0][kind] == found[1][kind]
    assert found[0][kind].keys() == scores.keys()
    assert "held_out/zero_shot/top-1" in scores
    for name, value in scores.items():
        # One of 32 pairs may change its place with another by a rounding.
        assert abs(found[0][kind][name] - value) <= 0.05, name


def test_a_signal_to_one_rank_stops_all_after_the_same_step(runs):
    _, found, _ = runs
    assert [each["interrupted"] for each in found] == 2 * [(signal.SIGTERM, ["step-00000003"])]


def test_a_folder_in_use_is_refused_on_every_rank(runs):
    _, found, _ = runs
    for each in found:
        assert "another process is training in" in each["locked"]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_one_rank_ends_what_two_began(runs, kind):
    folder, _, _ = runs
    run = folder / kind
    last = run / "checkpoints" / "step-00000008"
    last.rename(folder / f"{kind} last")
    train(run, PlainTask, **COMMON)
    assert last.exists()
    assert_same_weights(weights(run), folder)
    steps = [row["step"] for row in read_log(run) if "loss" in row]
    assert steps == list(range(1, 9))


def two_ranks_end(rank, folder):
    return train(folder / "one", PlainTask, **COMMON, parallel="fsdp")[0]


def test_two_ranks_end_what_one_began(runs):
    folder, _, _ = runs
    one = weights(folder / "one")
    (folder / "one" / "checkpoints" / "step-00000008").rename(folder / "one last")
    found = gloo_ranks.run(2, two_ranks_end, folder)
    assert all(isinstance(scores, dict) for scores in found), found
    ours = weights(folder / "one")
    from safetensors.torch import save_file

    save_file(one, folder / "one" / "model.safetensors")
    assert_same_weights(ours, folder)


def test_the_model_is_saved_whole(runs):
    folder, _, _ = runs
    described = json.loads((folder / "fsdp" / "model.json").read_text())
    assert described["kind"] == "clip" and described["embed_dim"] == 8
