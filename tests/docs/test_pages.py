"""Documents: their Python runs as it stands, their commands exist, their figures are on file."""

import io
import json
import re
import runpy
import shlex
import sys
from contextlib import redirect_stdout
from functools import cache

import pytest
import torch
from fastvlp_tests import pages

import fastvlp.cli

BLOCKS = [
    pytest.param(block, id=f"{page.relative_to(pages.ROOT)} {number}")
    for page in pages.PAGES
    if page != pages.INTEGRATIONS  # tests/docs/test_integrations.py asks more of those
    for number, block in enumerate(pages.blocks(page, "python"))
]
COMMANDS = sorted({command for page in pages.PAGES for command in pages.commands(page)})


@pytest.mark.parametrize("block", BLOCKS)
def test_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(block, {"__name__": "page"})


@cache
def help_of(program, *words):
    """What the program prints for --help, in this process: starting one takes seconds."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setenv("COLUMNS", "80")
        patch.setattr(sys, "argv", [program, *words, "--help"])
        with pytest.raises(SystemExit) as ended:
            if program == "fastvlp":
                fastvlp.cli.main()
            else:
                patch.syspath_prepend(str(pages.ROOT / "bench"))
                runpy.run_path(str(pages.ROOT / program), run_name="__main__")
    assert ended.value.code in (0, None)
    return printed.getvalue()


def program_of(words):
    """What to ask for help, and the words that it is given; None for programs of others."""
    words = words[[word.partition("=")[0].isupper() for word in words].index(False) :]
    if words[:1] == ["torchrun"]:
        words = ["fastvlp", *words[words.index("fastvlp.cli") + 1 :]] if "-m" in words else []
    if words[:1] == ["fastvlp"]:
        count = 3 if words[1] in ("train", "evaluate") else 2
        return words[:count], words[count:]
    if words[:1] == ["python"] and words[1].endswith(".py"):
        return words[1:2], words[2:]
    return None


@pytest.mark.parametrize("command", COMMANDS)
def test_options_of_a_command_exist(command):
    program = program_of(shlex.split(command))
    if program is None:
        assert shlex.split(command)[0] in ("pip", "pytest", "python", "torchrun", "export") or (
            command.startswith("LD_PRELOAD=")
        )
        return
    help_text = help_of(*program[0])
    for word in program[1]:
        if word.startswith("--"):
            assert re.search(rf"(?<![\w-]){word.partition('=')[0]}(?![\w-])", help_text), word


def test_the_commands_are_found():
    assert {"fastvlp train clip", "python bench/itc_throughput.py"} <= set(COMMANDS)


def test_figures_of_the_readme_are_those_on_file():
    results = pages.ROOT / "bench" / "results" / "contrastive" / "itc_throughput_cpu.json"
    rows = [row for row in json.loads(results.read_text())["rows"] if row["shape"]["n"] == 8192]
    ours = {row["dtype"]: row["ms"] for row in rows if row["impl"] == "fastvlp"}
    peers = {}
    for row in rows:
        if row["impl"] != "fastvlp" and row.get("softmax") == "fp32":
            peers.setdefault(row["dtype"], []).append(row["ms"])
    cells = re.findall(
        r"^\| (.+?) \| (.+?) \| (.+?) \|$", (pages.ROOT / "README.md").read_text(), re.M
    )
    table = {name: [fp32, bf16] for name, fp32, bf16 in cells}
    for column, dtype in enumerate(("fp32", "bf16")):
        best = min(peers[dtype])
        assert table["**fastvlp**"][column] == f"**{ours[dtype]:.0f}**"
        assert table["best peer with a float32 softmax"][column] == (
            f"{best:.0f}, {best / ours[dtype]:.1f} times as long"
        )
