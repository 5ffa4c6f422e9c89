"""The console command: help, unknown commands, missing packages."""

import signal
import subprocess
import sys

import pytest
import torch

import fastvlp
from fastvlp import cli
from fastvlp.commands.shards import Shards
from fastvlp.data.loader import TooManyBroken
from fastvlp.train.interrupts import Interrupted


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_help_lists_the_commands(arguments, capsys):
    cli.main(arguments)
    output = capsys.readouterr().out
    assert "usage: fastvlp COMMAND" in output
    for name, about in cli.COMMANDS.items():
        assert name in output and about in output


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([name, "--help"])
    assert f"usage: fastvlp {name}" in capsys.readouterr().out


def test_an_unknown_command_is_named(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["shard"])
    error = capsys.readouterr().err
    assert "there is no command 'shard'; did you mean 'shards'?" in error and "commands:" in error


def test_versions_are_said_by_the_command_and_the_module(capsys):
    cli.main(["--version"])
    said = capsys.readouterr().out
    assert said.startswith(f"fastvlp {fastvlp.__version__}, torch {torch.__version__}, Python 3.")
    module = subprocess.run(
        [sys.executable, "-m", "fastvlp", "--version"], capture_output=True, text=True, check=True
    )
    assert module.stdout == said


def test_without_tyro_it_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tyro", None)
    with pytest.raises(SystemExit, match="1"):
        cli.main(["shards", "--help"])
    assert 'pip install -e ".[train]"' in capsys.readouterr().err


def test_the_arguments_of_the_process_are_the_default(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fastvlp", "--help"])
    cli.main()
    assert "commands:" in capsys.readouterr().out


def test_an_interruption_is_no_trace(monkeypatch, capsys):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Shards, "run", interrupted)
    with pytest.raises(SystemExit, match="130"):
        cli.main(["shards", "a", "b"])
    assert "fastvlp shards: interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train clip --device cuda --folder {0}/run", "device: expected a CUDA device for each"),
        ("train clip --config {0}", "Is a directory"),
        ("train clip --config {0}/nowhere.yaml", "No such file or directory"),
        ("train clip --config {0}/broken.yaml", "broken.yaml: expected settings as `name: value`"),
        ("train clip --config {0}/binary", "binary: expected settings as `name: value`, got no Y"),
        ("train clip --lr nan --folder {0}/run", "lr: expected 0 or more, got nan"),
        ("train clip --model none --folder {0}/run", "model: expected one of"),
        ("train clip --folder {0}/run --data {0}/x.csv", "shards with: fastvlp shards {0}/x.csv"),
        ("train vilt --folder {0}/run --data {0}/no/*.tar", "shards: nothing is there"),
        ("train bert", "expected one of clip, vilt, albef to train, got 'bert'"),
        ("evaluate retrieval {0}/nowhere --batch-size 0", "batch_size: expected more than 0"),
        ("evaluate retrieval {0}/nowhere --device cuda", "device: expected a CUDA device"),
        ("shards {0}/nowhere {0}/out", "nowhere"),
    ],
)
def test_mistakes_end_in_one_message_and_status_2(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    (tmp_path / "broken.yaml").write_text("lr: [\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x81")
    (tmp_path / "x.csv").write_text("image,caption\n")
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments.format(tmp_path).split())
    shown = capsys.readouterr()
    assert message.format(tmp_path) in shown.err and "Traceback" not in shown.err


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (TooManyBroken("1 of 1 shards are broken"), 1),
        (PermissionError(13, "Permission denied"), 1),
        (FileNotFoundError(2, "No such file"), 2),
    ],
)
def test_failures_have_a_message_and_a_status(monkeypatch, error, status, capsys):
    def fail(self):
        raise error

    monkeypatch.setattr(Shards, "run", fail)
    with pytest.raises(SystemExit, match=str(status)):
        cli.main(["shards", "a", "b"])
    assert f"fastvlp shards: {error}" in capsys.readouterr().err


@pytest.mark.parametrize("mistake", [ValueError, TypeError, RuntimeError, KeyError])
def test_a_defect_shows_its_trace(monkeypatch, mistake):
    def fail(self):
        raise mistake("of a library")

    monkeypatch.setattr(Shards, "run", fail)
    with pytest.raises(mistake, match="of a library"):
        cli.main(["shards", "a", "b"])


def test_the_status_of_an_interrupted_run_tells_its_signal(monkeypatch, capsys):
    def stopped(self):
        raise Interrupted(signal.SIGTERM, 3, 8)

    monkeypatch.setattr(Shards, "run", stopped)
    with pytest.raises(SystemExit, match="143"):
        cli.main(["shards", "a", "b"])
    assert "interrupted at step 3 of 8; the checkpoint is saved" in capsys.readouterr().err
