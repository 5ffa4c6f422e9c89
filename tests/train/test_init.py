"""Training from given weights, and sizes from a file."""

import json

import pytest
import torch
from fastvlp_tests import photo_shards
from fastvlp_tests.clip_cases import tiny_open_clip, transformers_model
from fastvlp_tests.tiny_vocabularies import bert_vocabulary

from fastvlp import cli
from fastvlp.data.text import train_tokenizer
from fastvlp.models import albef, base, clip, vilt
from fastvlp.train import automatic, parallel, trained
from fastvlp.train.config import TrainAlbef, TrainClip, read_yaml
from fastvlp.train.sizes import with_file

pytestmark = pytest.mark.usefixtures("quick_runs")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return photo_shards.write(tmp_path_factory.mktemp("shards"), 8)


def train(system, folder, shards, *more):
    """A step of which the learning rate is 0: the weights are those it began with."""
    cli.main(
        ["train", system, "--data", shards, "--eval-data", shards, "--folder", str(folder),
         "--steps", "1", "--batch-size", "4", "--lr", "0", "--device", "cpu", "--precision",
         "float32", *map(str, more)]
    )  # fmt: skip
    return base.load(folder / "model")


def assert_equal(model, state):
    own = model.state_dict()
    assert own.keys() == state.keys() and all(own[name].equal(state[name]) for name in state)


def test_clip_goes_on_from_a_run_with_its_vocabulary(tmp_path, shards, capsys):
    tokenizer = train_tokenizer(["caption 1", "a bus"], context_length=9)
    begun = clip.create("tiny", vocab_size=tokenizer.vocab_size, context_length=9,
                        vision_layers=1, text_layers=1)  # fmt: skip
    base.save(begun, tmp_path / "first" / "model")
    tokenizer.save(tmp_path / "first" / "tokenizer.json")
    model = train("clip", tmp_path / "second", shards, "--init", tmp_path / "first")
    assert model.config == begun.config
    assert_equal(model, begun.state_dict())
    shown = capsys.readouterr().out
    assert f"model from {tmp_path / 'first'}: " in " ".join(shown.split())
    assert "learning from" not in shown
    # What was chosen for it stays as it is when it goes on.
    begun_with = read_yaml(tmp_path / "second" / "config.yaml")
    options = ["--data", shards, "--init", str(tmp_path / "first"), "--lr", "0", "--device", "cpu"]
    options += ["--precision", "float32", "--folder", str(tmp_path / "second")]
    cli.main(["train", "clip", *options])
    assert "chosen" not in capsys.readouterr().out
    again = read_yaml(tmp_path / "second" / "config.yaml")
    assert again == begun_with | {"eval_data": []}
    kept = trained.tokenizer(tmp_path / "second", model)
    assert kept(["a bus 1"]).equal(tokenizer(["a bus 1"]))


def test_published_weights_keep_their_normalisation(tmp_path, shards):
    theirs = transformers_model()
    folder = tmp_path / "published"
    theirs.save_pretrained(folder)
    values = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.1, 0.2, 0.3]}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    train_tokenizer(["caption 1"], context_length=20).save(folder / "tokenizer.json")
    model = train("clip", tmp_path / "run", shards, "--init", folder)
    assert model.config.activation == "quick_gelu" and model.config.image_size == 32
    for place in (tmp_path / "run", tmp_path / "run" / "best"):
        assert trained.image_values(place) == ((0.4, 0.5, 0.6), (0.1, 0.2, 0.3))


def test_open_clips_weights_are_told_their_activation(tmp_path, shards, capsys):
    torch.save(tiny_open_clip().state_dict(), tmp_path / "weights.pt")
    with pytest.raises(SystemExit, match="2"):
        train("clip", tmp_path / "run", shards, "--init", tmp_path / "weights.pt")
    assert "activation: open_clip CLIP weights work with" in capsys.readouterr().err


@pytest.mark.parametrize("tasks", [("mlm", "itm"), ("vqa",)])
def test_vilt_goes_on_and_heads_that_it_lacks_begin_anew(tmp_path, shards, tasks):
    torch.manual_seed(5)
    begun = vilt.create("tiny", vocab_size=8, tasks=tasks, layers=1, answers=3, dropout=0.0)
    base.save(begun, tmp_path / "first" / "model")
    bert_vocabulary(tmp_path / "first", ["caption", "1", "##0"])
    model = train("vilt", tmp_path / "run", shards, "--init", tmp_path / "first")
    assert model.config.tasks == ("mlm", "itm")
    state = {k: v for k, v in begun.state_dict().items() if not k.startswith("vqa_")}
    own = model.state_dict()
    assert all(own[name].equal(state[name]) for name in state) and len(state) > 20


def test_weights_of_another_system_are_refused(tmp_path, shards, capsys):
    base.save(vilt.create("tiny", vocab_size=8, layers=1), tmp_path / "first" / "model")
    with pytest.raises(SystemExit, match="2"):
        train("clip", tmp_path / "run", shards, "--init", tmp_path / "first")
    assert "init: expected weights of clip, got those of vilt" in capsys.readouterr().err


def test_sizes_come_from_a_file(tmp_path, shards):
    file = tmp_path / "sizes.yaml"
    file.write_text("vision_layers: 1\ntext_layers: 2\nimage_size: 32\ncontext_length: 16\n")
    model = train("clip", tmp_path / "run", shards, "--model-config", file)
    assert (model.config.vision_layers, model.config.image_size) == (1, 32)
    assert model.config.vision_width == clip.CONFIGS["tiny"].vision_width
    assert trained.tokenizer(tmp_path / "run", model).context_length == 16


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vision_layer: 1", "got 'vision_layer'; did you mean 'vision_layers'"),
        ("vocab_size: 7", "sizes.yaml: expected no vocab_size, which is the tokenizer's"),
        ("vision_heads: 5", "sizes.yaml: vision_heads must divide vision_width"),
        ("vision_heads: many", "sizes.yaml: vision_heads must be a positive integer"),
    ],
)
def test_sizes_that_do_not_fit_are_named(tmp_path, text, message):
    (tmp_path / "sizes.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        with_file(clip.CONFIGS["tiny"], tmp_path / "sizes.yaml")


def test_lists_are_stages_and_tasks(tmp_path):
    (tmp_path / "sizes.yaml").write_text("vision_layers: [1, 1, 1, 1]\n")
    assert with_file(clip.CONFIGS["RN50"], tmp_path / "sizes.yaml").vision_layers == (1, 1, 1, 1)
    (tmp_path / "sizes.yaml").write_text("vision_layers: 2\n")
    assert with_file(albef.CONFIGS["tiny"], tmp_path / "sizes.yaml").vision_layers == 2
    assert with_file(albef.CONFIGS["tiny"], None) is albef.CONFIGS["tiny"]


def test_albef_takes_sizes_of_a_file(tmp_path, shards):
    from fastvlp.train.tasks import albef_setup

    (tmp_path / "sizes.yaml").write_text("vision_layers: 1\n")
    config = TrainAlbef(folder=tmp_path, data=shards, batch_size=4, model="tiny",
                        model_config=tmp_path / "sizes.yaml")  # fmt: skip
    with parallel.ranks("cpu") as ranks:
        task, _ = albef_setup.build(config, ranks)
    assert task.model.config.vision_layers == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation": "gelu"}, "activation: expected none without --init"),
        ({"init": "x", "model": "tiny"}, "model: expected none, because the sizes are those of x"),
        ({"init": "x", "model_config": "y"}, "model_config: expected none, because"),
    ],
)
def test_settings_that_contradict_one_another_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainClip(**settings)


def test_given_weights_are_trained_gently():
    ranks = parallel.Ranks(0, 1, torch.device("cpu"), None)
    found = automatic.for_pairs(180, TrainClip(init="x"), 2, ranks)
    assert (found["lr"], found["batch_size"], found["epochs"]) == (1e-5, 32, 11.0)
    assert automatic.settled(TrainClip(init="x"), ranks).model is None
