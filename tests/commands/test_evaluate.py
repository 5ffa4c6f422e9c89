"""`fastvlp evaluate` on several sets, with intervals, and by a linear probe."""

import json

import pytest
from fastvlp_tests import photo_shards
from PIL import Image

from fastvlp import cli
from fastvlp.commands.evaluate import parse
from fastvlp.train.config import TrainClip, from_mapping, read_yaml, to_yaml
from fastvlp.train.tasks.data import named_sets


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    photo_shards.write(folder / "val", 8)
    photo_shards.write(folder / "more", 5)
    return folder


def test_retrieval_names_its_data_and_has_intervals(small_run, sets, tmp_path, capsys):
    options = [str(small_run), "--data", str(sets / "val"), "--output", str(tmp_path / "s.json")]
    found = parse(["retrieval", *options]).run()
    shown = capsys.readouterr().out
    assert f"data {sets / 'val'}, pairs 8" in shown
    ends = found["text_to_image R@5 low"], found["text_to_image R@5 high"]
    value = found["text_to_image R@5"]
    assert 0 <= ends[0] <= value <= ends[1] <= 1
    line = f"{'text_to_image R@5':30} {value:.4f}  ({ends[0]:.4f} to {ends[1]:.4f})"
    assert line in shown.splitlines()
    assert not any(" low" in each for each in shown.splitlines())
    written = json.loads((tmp_path / "s.json").read_text())
    assert written["pairs"] == 8 and written["text_to_image R@5 low"] == ends[0]


def test_several_sets_are_evaluated_one_after_another(small_run, sets, tmp_path, capsys):
    alone = parse(["retrieval", str(small_run), "--data", str(sets / "more")]).run()
    found = parse(
        ["retrieval", str(small_run), "--data", str(sets / "val"), f"other={sets / 'more'}",
         "--output", str(tmp_path / "s.json")]
    ).run()  # fmt: skip
    assert {k: v for k, v in found.items() if k.startswith("other ")} == {
        f"other {k}": v for k, v in alone.items()
    }
    assert "val text_to_image R@1" in found
    written = json.loads((tmp_path / "s.json").read_text())["sets"]
    assert written["val"]["pairs"] == 8
    assert written["other"] == {"data": str(sets / "more"), "pairs": 5, "left_out": 0} | alone


def test_training_evaluates_on_several_sets(sets, tmp_path, capsys):
    cli.main(
        ["train", "clip", "--data", str(sets / "val"), "--eval-data", str(sets / "val"),
         f"other={sets / 'more'}", "--folder", str(tmp_path), "--steps", "1", "--batch-size", "4",
         "--device", "cpu", "--precision", "float32"]
    )  # fmt: skip
    shown = capsys.readouterr().out
    assert "held out  8 in val, 5 in other" in shown
    assert "val/text_to_image" in shown and "other/image_to_text" in shown
    assert read_yaml(tmp_path / "config.yaml")["eval_data"] == [
        str(sets / "val"), f"other={sets / 'more'}",
    ]  # fmt: skip
    cli.main(["evaluate", "retrieval", str(tmp_path)])
    assert "other text_to_image R@1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], {}),
        (["a/b"], {"eval": "a/b"}),
        (["x=a/b"], {"x": "a/b"}),
        (["a/b/*.tar", "a/c/{0..3}.tar"], {"b": "a/b/*.tar", "c": "a/c/{0..3}.tar"}),
        (["a/x=1/s.tar", "b"], {"x=1": "a/x=1/s.tar", "b": "b"}),
    ],
)
def test_names_of_sets(given, expected):
    assert named_sets(given) == expected


def test_two_sets_of_one_name_are_refused():
    with pytest.raises(ValueError, match="eval_data: expected a name for each set, got 'val' for"):
        named_sets(["a/val", "b/val"])


def test_settings_of_one_set_are_read_as_they_were_written(tmp_path):
    for written, expected in (("eval_data: x", ("x",)), ("eval_data: null", ())):
        (tmp_path / "c.yaml").write_text(f"{written}\n")
        assert from_mapping(TrainClip, read_yaml(tmp_path / "c.yaml"), "c").eval_data == expected
    config = TrainClip(eval_data="x")
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert from_mapping(TrainClip, read_yaml(tmp_path / "c.yaml"), "c") == config


def classes(folder, numbers):
    """Images of two colours, each in several shades."""
    for number in numbers:
        place = folder / ("odd" if number % 2 else "even")
        place.mkdir(parents=True, exist_ok=True)
        colour = (200, 40 + 5 * number, 30) if number % 2 else (30, 5 * number, 220)
        Image.new("RGB", (70, 66), colour).save(place / f"{number}.png")
    return folder


def test_a_linear_probe_learns_classes_of_images(small_run, tmp_path, capsys):
    train, test = classes(tmp_path / "train", range(12)), classes(tmp_path / "test", range(12, 18))
    options = ["linear-probe", str(small_run), "--train", str(train), "--test", str(test)]
    found = parse([*options, "--output", str(tmp_path / "s.json")]).run()
    assert found["top-1"] == 1.0 and found["chance top-1"] == 0.5
    written = json.loads((tmp_path / "s.json").read_text())
    assert (written["classes"], written["train_images"], written["test_images"]) == (2, 12, 6)
    assert parse([*options, "--penalty", "0.1"]).run()["penalty"] == 0.1
    classes(tmp_path / "test", range(12, 13))
    (tmp_path / "test" / "even").rename(tmp_path / "test" / "other")
    with pytest.raises(ValueError, match="test: expected folders of the classes in .*'other'"):
        parse(options).run()
