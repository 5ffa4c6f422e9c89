import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import word_patch_alignment
from baselines.word_patch_alignment import peers
from fastvlp_tests.bench_runs import BRIEF

BENCH = Path(__file__).parents[2] / "bench"


def small(text):
    args = word_patch_alignment.parse(
        ["--pairs", "3", "--words", "9", "--patches", "13", "--dim", "64"]
    )
    found = word_patch_alignment.inputs(args, "fp32", text)
    return peers.Inputs(found.text.double(), found.image.double(), *found.masks, found.upstream)


@pytest.mark.parametrize("text", ["full", "captions"])
def test_the_batched_loop_computes_the_same_distance(text):
    inputs = small(text)
    found = peers.forward_backward(peers.batched_loop, inputs)()
    for name, value in peers.float64_reference(inputs).items():
        torch.testing.assert_close(found[name], value)
    alone = peers.forward(peers.batched_loop, inputs)()
    torch.testing.assert_close(alone["distance"], found["distance"])


def test_captions_leave_out_the_special_tokens():
    words = (~small("captions").text_padding).sum(1)
    assert ((words >= 4) & (words <= 7)).all()
    assert not small("full").text_padding.any()


def test_the_summary_names_ratios_and_shares():
    def row(impl, ms, phase="fwd+bwd"):
        shape = {"longest": 40}
        return {"op": "o", "impl": impl, "dtype": "fp32", "shape": shape, "ms": ms, "phase": phase}

    rows = [row("fastvlp", 10.0), row("floor", 8.0), row("batched loop", 90.0)]
    text = word_patch_alignment.summary(
        [*rows, row("layers", 990.0, word_patch_alignment.LAYERS)], layers=12
    )
    for part in ("10.0 ms", "9.0x as fast as batched loop", "12 layers (990 ms): fastvlp 1.00%"):
        assert part in text
    assert "floor" not in text


@pytest.mark.parametrize("flags", [["--pairs", "-1"], ["--dim", "65"], ["--layers", "-1"]])
def test_wrong_flags_end_with_a_message(flags, capsys):
    with pytest.raises(SystemExit):
        word_patch_alignment.parse(flags)
    assert flags[0] in capsys.readouterr().err


def test_a_quick_run_writes_every_row(tmp_path):
    target = tmp_path / "alignment.json"
    command = [
        sys.executable, str(BENCH / "word_patch_alignment.py"), *BRIEF, "--pairs", "2",
        "--words", "8", "--patches", "12", "--dim", "64", "--text", "captions", "--json",
        str(target),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(target.read_text())["rows"]

    def by_phase(phase):
        return {row["impl"] for row in rows if row["phase"] == phase}

    assert by_phase("fwd") == {"fastvlp", "batched loop"}
    assert by_phase("fwd+bwd") == {"fastvlp", "floor", "batched loop"}
    assert by_phase("step") == {"transformer of 12 layers"}
    assert all(row["error"] < 1e-5 for row in rows if row["error"] is not None)
    assert "as fast as batched loop" in done.stdout and "share of a step" in done.stdout
