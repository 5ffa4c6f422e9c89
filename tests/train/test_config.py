"""Settings: files, presets, the command line, and what is wrong with them."""

import dataclasses

import pytest
from fastvlp_tests.tiny_run import settings

from fastvlp.commands import train_options
from fastvlp.commands.train import SYSTEMS, parse
from fastvlp.models import albef, clip, vilt
from fastvlp.train import ranges
from fastvlp.train.config import TrainClip, from_mapping, read_yaml, to_yaml
from fastvlp.train.presets import PRESETS


def test_a_saved_configuration_reads_back(tmp_path):
    config = settings(tmp_path, betas=(0.8, 0.95), chunk_size=4)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert from_mapping(TrainClip, read_yaml(tmp_path / "config.yaml"), "file") == config


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path):
    (tmp_path / "c.yaml").write_text("lr: 1e-3\nsteps: 5\n")
    assert from_mapping(TrainClip, read_yaml(tmp_path / "c.yaml"), "file").lr == 1e-3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": 1.0}, "unknown setting 'learning_rate'"),
        ({"lr": "fast"}, "lr: expected a number"),
        ({"steps": 1.5}, "steps: expected int"),
        ({"steps": True}, "steps: expected int"),
        ({"betas": [0.9]}, "betas: expected 2 values"),
        ({"precision": "half"}, "precision: expected one of"),
        ({"progress": "no"}, "progress: expected bool"),
        ({"steps": 0}, "steps: expected more than 0"),
        ({"lr": -1.0}, "lr: expected 0 or more"),
        ({"ema": 1.0}, "ema: expected 0 to 1"),
        ({"max_broken": 2.0}, "max_broken: expected 0 to 1"),
    ],
)
def test_wrong_settings_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        from_mapping(TrainClip, values, "here")


def test_a_length_is_needed_where_none_is_chosen():
    with pytest.raises(ValueError, match="steps, epochs: expected one of the two"):
        from_mapping(SYSTEMS["vilt"], {"epochs": None}, "here")


def test_every_preset_is_made_of_settings():
    for system, presets in PRESETS.items():
        for name, values in presets.items():
            made = from_mapping(SYSTEMS[system], values, f"{system} {name}")
            assert all(getattr(made, k) == v for k, v in values.items())


def test_options_count_over_the_file_and_the_file_over_the_preset(tmp_path):
    (tmp_path / "c.yaml").write_text("batch_size: 64\nseed: 7\n")
    command = parse(
        ["clip", "--preset", "paper", "--config", str(tmp_path / "c.yaml"), "--seed", "9"]
    )
    paper = from_mapping(TrainClip, PRESETS["clip"]["paper"], "paper")
    assert command.config == dataclasses.replace(paper, batch_size=64, seed=9)


def test_without_options_the_defaults_count():
    assert parse(["clip"]).config == TrainClip()


def test_help_lists_every_setting_with_its_default(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(["clip", "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for field in dataclasses.fields(TrainClip):
        assert f"--{field.name.replace('_', '-')}" in shown
    assert "(default: 1e-06)" in shown and "--preset" in shown


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_setting_is_in_one_group_and_has_a_text(system, capsys):
    names = [name for group in train_options.GROUPS.values() for name in group]
    known = {field.name for field in dataclasses.fields(SYSTEMS[system])}
    assert len(names) == len(set(names)) and known <= set(names)
    assert known <= train_options.field_texts(SYSTEMS[system]).keys()
    with pytest.raises(SystemExit):
        parse([system, "--help"])
    shown = capsys.readouterr().out
    for title in train_options.GROUPS:
        assert f"{title} options" in shown
    text = " ".join(shown.replace("│", " ").split())
    models = {"clip": clip, "vilt": vilt, "albef": albef}[system].CONFIGS
    assert f"Names: {', '.join(models)}." in text


def test_groups_name_settings_only():
    names = {name for group in train_options.GROUPS.values() for name in group}
    fields = {field.name for cls in SYSTEMS.values() for field in dataclasses.fields(cls)}
    assert names <= fields


def test_other_systems_and_presets_are_refused():
    with pytest.raises(ValueError, match="expected one of clip"):
        parse(["vil"])
    with pytest.raises(ValueError, match="preset: expected one of openmoji, paper"):
        parse(["clip", "--preset", "best"])


OUTSIDE = [
    pytest.param(cls, name, value, id=f"{cls.__name__}-{name}-{value}")
    for cls in SYSTEMS.values()
    for name, kind in ranges.numeric_fields(cls).items()
    for value in ([-1] if kind is int else [float("nan"), float("inf"), float("-inf"), -1.0])
]


@pytest.mark.parametrize(("cls", "name", "value"), OUTSIDE)
def test_every_number_has_a_range(cls, name, value):
    given = (0.5, value) if isinstance(getattr(cls(), name), tuple) else value
    with pytest.raises(ValueError, match=f"{name}: expected .* got {value}"):
        cls(**{name: given})


def test_numeric_fields_are_those_of_the_annotations():
    found = ranges.numeric_fields(SYSTEMS["albef"])
    assert found["betas"] is float and found["queue_size"] is int and found["alpha"] is float
    assert not {"match_ids", "folder", "precision", "model", "progress"} & found.keys()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("clip_norm", 0.0, "more than 0"),
        ("betas", (0.9, 1.0), "0 to 1, 1 excluded"),
        ("mask_rate", 0.0, "0 to 1, 0 excluded"),
        ("alpha", 1.5, "0 to 1, got"),
        ("seed", 2**32, f"0 to {2**32 - 1}"),
    ],
)
def test_ends_of_a_range_belong_to_it_or_not(name, value, expected):
    with pytest.raises(ValueError, match=f"{name}: expected {expected}"):
        SYSTEMS["albef"](**{name: value})


@pytest.mark.parametrize(("name", "value"), [("steps", 1.5), ("lr", "1"), ("keep", True)])
def test_what_is_no_number_is_refused(name, value):
    with pytest.raises(TypeError, match=f"{name}: expected a .*number, got"):
        TrainClip(**{name: value})
