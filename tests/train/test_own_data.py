"""Shards of one's own from the command line: learned vocabulary, own evaluation data, signals."""

import json
import os
import signal

import pytest
from fastvlp_tests import photo_shards
from fastvlp_tests.tiny_vocabularies import bert_vocabulary

from fastvlp import cli
from fastvlp.commands import evaluate
from fastvlp.data.text import BertTokenizer
from fastvlp.data.text import files as tokenizer_files
from fastvlp.train import automatic, parallel
from fastvlp.train.config import TrainAlbef, TrainClip
from fastvlp.train.tasks import albef_setup, clip_setup
from fastvlp.train.tasks.clip import ClipTask
from fastvlp.train.trained import own_data

pytestmark = pytest.mark.usefixtures("quick_runs")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return photo_shards.write(tmp_path_factory.mktemp("shards"), 12, 6)


def command(folder, shards, *more):
    return [
        "train", "clip", "--folder", str(folder), "--data", shards, "--eval-data", shards,
        "--steps", "2", "--batch-size", "4", "--precision", "float32", "--device", "cpu", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def story(shards, tmp_path_factory):
    """Train, stop by SIGTERM, evaluate, go on, evaluate: what was printed, and the folder."""
    folder = tmp_path_factory.mktemp("run") / "mine"
    taken = []

    def after_step(task, plain=ClipTask.after_step):
        plain(task)
        taken.append(task)
        if len(taken) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClipTask, "after_step", after_step)
        with pytest.raises(SystemExit) as stopped:
            cli.main(command(folder, shards))
    return folder, stopped.value.code


def test_the_story_of_a_run_on_own_data(story, shards, tmp_path, capfd):
    folder, code = story
    assert code == 128 + signal.SIGTERM
    vocabulary = (folder / "tokenizer.json").read_text()
    cli.main(["evaluate", "retrieval", str(folder), "--output", str(tmp_path / "scores.json")])
    shown = capfd.readouterr().out
    assert "its run did not end; taking the checkpoint step-00000001" in shown
    assert f"data {shards}, pairs 12" in shown
    written = json.loads((tmp_path / "scores.json").read_text())
    assert written["data"] == shards and written["pairs"] == 12 and "text_to_image R@1" in written
    cli.main(command(folder, shards))
    shown = capfd.readouterr().out
    assert "resuming at step 1 of 2" in shown and "learning" not in shown
    assert shown.count("eval/text_to_image ") == 1 and "eval/eval" not in shown
    assert (folder / "tokenizer.json").read_text() == vocabulary


def test_zero_shot_of_a_run_on_shards_asks_for_images(story):
    with pytest.raises(ValueError, match="images: expected --images FOLDER"):
        evaluate.parse(["zero-shot", str(story[0])]).run()


def test_evaluation_asks_for_data_where_a_model_has_none(tmp_path):
    assert own_data(tmp_path) == ()
    (tmp_path / "config.yaml").write_text("data: shards\n")
    assert own_data(tmp_path) == ()
    (tmp_path / "config.yaml").write_text("data: shards\neval_data: others\n")
    assert own_data(tmp_path) == own_data(tmp_path / "model.safetensors") == ("others",)
    (tmp_path / "config.yaml").write_text("data: shards\neval_data: [a, b=c]\n")
    assert own_data(tmp_path) == ("a", "b=c")
    (tmp_path / "config.yaml").write_text("data: openmoji\n")
    assert own_data(tmp_path) == ("openmoji",)
    found = evaluate.parse(["retrieval", str(tmp_path / "elsewhere" / "x.pt")]).options
    with pytest.raises(ValueError, match="data: expected --data SHARDS, or --data openmoji"):
        found.sets()


def test_a_bpe_vocabulary_is_learned_for_clip_and_the_option_named(tmp_path, shards, capsys):
    config = TrainClip(folder=tmp_path, data=shards, batch_size=4, device="cpu")
    with parallel.ranks("cpu") as ranks:
        task, _ = clip_setup.build(automatic.settled(config, ranks), ranks)
    shown = capsys.readouterr().out
    assert "learning from 12 captions" in shown and "\n\n" not in shown
    assert f"saved in {tmp_path / 'tokenizer.json'}; another one can be given by --token" in shown
    ids = task.tokenizer(["caption 7", "caption 5x"])
    assert task.tokenizer.decode(ids[:1]) == ["caption 7"] and ids.shape == (2, 77)
    stored = tokenizer_files.for_clip(tmp_path / "tokenizer.json")
    assert stored(["caption 7", "caption 5x"]).equal(ids)
    assert task.model.config.vocab_size == stored.vocab_size


def test_albef_learns_its_vocabulary_unless_its_text_weights_have_one(
    tmp_path, shards, monkeypatch
):
    given = {"folder": tmp_path, "data": shards, "batch_size": 4, "model": "tiny"}
    own = BertTokenizer(bert_vocabulary(tmp_path)).entries
    monkeypatch.setattr(albef_setup, "start_from_files", lambda model, config: None)
    monkeypatch.setattr(albef_setup, "bert_vocabulary", lambda path, captions: own)
    with parallel.ranks("cpu") as ranks:
        task, _ = albef_setup.build(TrainAlbef(**given), ranks)
        learned = BertTokenizer(tmp_path / "vocab.txt").entries
        assert task.tokenizer.entries == learned and "caption" in learned
        config = TrainAlbef(**given, text_weights=tmp_path / "bert.bin")
        assert albef_setup.build(config, ranks)[0].tokenizer.entries == own
