"""What a run of CLIP chooses for its data and machine, and that a run that goes on keeps it."""

import json

import pytest
import torch
from fastvlp_tests import photo_shards

from fastvlp import cli
from fastvlp.train import automatic
from fastvlp.train.config import TrainClip, TrainVilt, read_yaml
from fastvlp.train.parallel import Ranks
from fastvlp.train.presets import OPENMOJI_CLIP

pytestmark = pytest.mark.usefixtures("quick_runs")
CPU = Ranks(0, 1, torch.device("cpu"), None)
GPU = Ranks(0, 1, torch.device("cuda"), None)


@pytest.mark.parametrize(
    ("pairs", "ranks", "given", "expected"),
    [
        (180, CPU, {}, ("tiny", 64, 60.0, 1e-3, 12)),
        (2, CPU, {}, ("tiny", 1, 60.0, 1e-3, 12)),
        (3000, CPU, {}, ("tiny", 128, 13.0, 1e-3, 29)),
        (10**6, CPU, {}, ("tiny", 128, 5.0, 1e-3, 2000)),
        (3000, GPU, {}, ("tiny", 1024, 60.0, 1e-3, 12)),
        (300_000, GPU, {}, ("ViT-S/32", 1024, 33.0, 5e-4, 963)),
        (12 * 10**6, GPU, {}, ("ViT-B/32", 1024, 5.0, 5e-4, 2000)),
        (180, CPU, {"model": "ViT-S/32", "batch_size": 16}, ("ViT-S/32", 16, 60.0, 5e-4, 66)),
        (180, CPU, {"steps": 30}, ("tiny", 64, 60.0, 1e-3, 3)),
        (180, CPU, {"epochs": 4.0}, ("tiny", 64, 4.0, 1e-3, 0)),
    ],
)
def test_sizes_for_data_and_machine(pairs, ranks, given, expected):
    found = automatic.for_pairs(pairs, TrainClip(**given), 2, ranks)
    assert tuple(found[name] for name in automatic.OPEN[:3] + ("lr", "warmup")) == expected


def test_ranks_share_a_batch_that_divides_among_them():
    found = automatic.for_pairs(180, TrainClip(), 2, Ranks(0, 3, torch.device("cpu"), None))
    assert found["batch_size"] == 3 * 16


def test_what_is_given_or_built_in_is_not_chosen():
    assert automatic.settled(TrainVilt(), CPU) == TrainVilt()
    assert automatic.settled(TrainClip(), CPU) == TrainClip(**OPENMOJI_CLIP)
    assert automatic.settled(TrainClip(steps=3), CPU).epochs is None


def test_the_choice_is_said_and_kept_when_the_run_goes_on(tmp_path, capsys):
    shards = photo_shards.write(tmp_path / "shards", 12)
    options = ["train", "clip", "--data", shards, "--folder", str(tmp_path / "run"),
               "--device", "cpu", "--precision", "float32"]  # fmt: skip
    cli.main([*options, "--steps", "2"])
    shown = capsys.readouterr().out
    assert "chosen    model tiny, batch size 4, lr 0.001, warmup 0, for 12 pairs and" in shown
    begun = read_yaml(tmp_path / "run" / "config.yaml")
    assert (begun["model"], begun["batch_size"], begun["steps"]) == ("tiny", 4, 2)
    cli.main(options)
    shown = capsys.readouterr().out
    assert "chosen" not in shown and "all 2 steps are taken" in shown
    assert read_yaml(tmp_path / "run" / "config.yaml") == begun
    assert json.loads((tmp_path / "run" / "model.json").read_text())["image_size"] == 64
