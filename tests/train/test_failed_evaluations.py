"""An evaluation that fails costs neither the steps before it nor the model."""

import pytest
import torch
from fastvlp_tests import photo_shards
from fastvlp_tests.tiny_run import PlainTask, train, weights
from fastvlp_tests.tiny_vocabularies import bpe_file

from fastvlp.commands import evaluate
from fastvlp.commands import train as command
from fastvlp.data.loader import TooManyBroken

pytestmark = pytest.mark.usefixtures("quick_runs")


class FailingTask(PlainTask):
    """Cannot be evaluated."""

    def evaluate(self, model):
        raise RuntimeError("no scores")


def test_the_model_is_there_and_a_restart_evaluates_it(tmp_path):
    with pytest.raises(RuntimeError, match="no scores"):
        train(tmp_path, FailingTask, steps=1)
    left = weights(tmp_path)
    # A run of before, which ended without a model.
    (tmp_path / "model.safetensors").unlink()
    scores, task = train(tmp_path, PlainTask, steps=1)
    assert "held_out/text_to_image/R@1" in scores
    again = weights(tmp_path)
    assert all(torch.equal(left[name], value) for name, value in again.items())
    assert not torch.equal(task.model.text_projection, left["text_projection"])  # the average is


def test_one_within_the_run_is_not_met_again(tmp_path):
    options = {"steps": 2, "save_every": 1, "evaluate_every": 1}
    with pytest.raises(RuntimeError, match="no scores"):
        train(tmp_path, FailingTask, **options)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    with pytest.raises(RuntimeError, match="no scores"):
        train(tmp_path, FailingTask, **options)
    assert (tmp_path / "model.safetensors").exists()


def test_broken_samples_are_borne_as_the_options_say(tmp_path):
    """Three of eight images cannot be decoded, which only decoding tells."""

    def sample(number):
        if number % 3:
            return photo_shards.good(number)
        return photo_shards.good(number, jpg=photo_shards.undecodable(number))

    held_out = photo_shards.write(tmp_path / "held_out", 8, sample=sample)
    shards = photo_shards.write(tmp_path / "shards", 8)
    vocabulary = bpe_file(tmp_path)
    options = [
        "clip", "--preset", "paper", "--model", "tiny", "--folder", str(tmp_path / "run"),
        "--data", shards, "--eval-data", held_out, "--tokenizer", str(vocabulary), "--steps", "1",
        "--batch-size", "4", "--no-progress", "--precision", "float32", "--device", "cpu",
    ]  # fmt: skip
    with pytest.raises(TooManyBroken, match="max_broken=0.1"):
        command.parse([*options, "--verify", "decode"]).run()
    scores = command.parse([*options, "--verify", "decode", "--max-broken", "0.5"]).run()
    given = ["retrieval", str(tmp_path / "run"), "--data", held_out]
    with pytest.raises(TooManyBroken, match="max_broken=0.1"):
        evaluate.parse([*given, "--verify", "decode"]).run()
    found = evaluate.parse([*given, "--max-broken", "0.5"]).run()
    assert found["text_to_image R@1"] == scores["eval/text_to_image/R@1"]
