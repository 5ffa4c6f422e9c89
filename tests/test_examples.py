"""Examples: they run as they stand, on a few images and for a few steps."""

import importlib.util
import json
from functools import partial
from pathlib import Path

import matplotlib
import pytest
import torch
from matplotlib import pyplot

from fastvlp.data import openmoji

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def few_images(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTVLP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(openmoji, "build", partial(openmoji.build, limit=64))
    monkeypatch.chdir(tmp_path)


def load(name):
    spec = importlib.util.spec_from_file_location("example", EXAMPLES / name)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example


def test_the_clip_of_one_file(monkeypatch, capsys, tmp_path):
    example = load("train_clip_openmoji.py")
    monkeypatch.setattr(example, "STEPS", 3)
    monkeypatch.setattr(example, "BATCH", 8)
    example.main()
    said = capsys.readouterr().out
    assert "composition" in said and "concept" in said and "R@10" in said
    assert list((tmp_path / "cache").rglob("tiny_clip.safetensors"))


def test_the_fusion_encoder_learns_where_each_colour_is(capsys):
    example = load("fusion_encoder.py")
    scores = example.main()
    # The same words in swapped places: only the image tells that they do not match.
    assert set(scores) == {"own caption", "wrong colour", "swapped colours"}
    assert min(scores.values()) > 0.95
    said = capsys.readouterr().out
    assert f"step {example.STEPS} of {example.STEPS}  loss 0.0" in said
    assert "swapped colours" in said and "s in all" in said


def cells(notebook):
    """The code of a notebook, cell by cell."""
    for cell in json.loads(notebook.read_text())["cells"]:
        if cell["cell_type"] == "code":
            yield "".join(cell["source"])


def test_the_notebook(monkeypatch):
    matplotlib.use("agg")
    shown = []
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: shown.append(1))
    names = {"__name__": "notebook"}
    first, *others = cells(EXAMPLES / "look_at_retrievals.ipynb")
    assert "STEPS, BATCH = 400, 128" in first
    for cell in (first.replace("STEPS, BATCH = 400, 128", "STEPS, BATCH = 3, 8"), *others):
        exec(cell, names)
    assert len(shown) == 2 and len(names["losses"]) == 3
    assert torch.tensor(names["losses"]).isfinite().all()
    assert set(names["scores"]) == {"composition", "concept"}
    pyplot.close("all")
