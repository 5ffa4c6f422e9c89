"""The curves of a few steps on a few images, and what is written of them."""

import json
from functools import partial

import pytest
import train_curves

from fastvlp.data import openmoji
from fastvlp.train.config import TrainClip


def test_both_curves_are_written_and_agree(tmp_path, monkeypatch):
    monkeypatch.setattr(openmoji, "build", partial(openmoji.build, limit=24))
    monkeypatch.setitem(train_curves.SYSTEMS, "clip", partial(TrainClip, batch_size=8))
    files = {"--json": tmp_path / "curves.json", "--plot": tmp_path / "curves.png"}
    train_curves.main(
        ["--quick", "--systems", "clip", *(str(x) for pair in files.items() for x in pair)]
    )
    found = json.loads(files["--json"].read_text())
    ours, plain = found["rows"]
    assert (ours["impl"], plain["impl"]) == ("fastvlp", "reference")
    assert len(ours["loss"]) == len(plain["loss"]) == ours["shape"]["steps"]
    assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-3)
    assert ours["error"] == train_curves.difference(ours["loss"], plain["loss"])
    assert files["--plot"].read_bytes().startswith(b"\x89PNG")


def test_the_difference_is_the_largest_of_a_step():
    assert train_curves.difference([1.0, 3.0], [1.0, 2.0]) == 0.5
