"""The console command: help, unknown commands, missing packages."""

import sys

import pytest

from fastvlp import cli


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
    assert "there is no command 'shard'" in error and "commands:" in error


def test_without_tyro_it_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tyro", None)
    with pytest.raises(SystemExit, match="1"):
        cli.main(["shards", "--help"])
    assert 'pip install "fastvlp[train]"' in capsys.readouterr().err


def test_the_arguments_of_the_process_are_the_default(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fastvlp", "--help"])
    cli.main()
    assert "commands:" in capsys.readouterr().out


def test_an_interruption_is_no_trace(monkeypatch, capsys):
    from fastvlp.commands.shards import Shards

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Shards, "run", interrupted)
    with pytest.raises(SystemExit, match="130"):
        cli.main(["shards", "a", "b"])
    assert "fastvlp shards: interrupted" in capsys.readouterr().err
