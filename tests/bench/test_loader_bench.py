"""bench/loader.py: every implementation makes the same batches, a quick run every row."""

import json

import loader
import pytest
import torch
from _harness import measure

from fastvlp.data.images.recipes import RECIPES


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return loader.Data(loader.photographs(6), tmp_path_factory.mktemp("data"), 4)


@pytest.mark.parametrize("name", ["clip_eval", "albef_eval", "vilt_eval"])
def test_implementations_make_the_same_batches(data, name):
    reference = loader.first_batch(loader.PillowTransform(RECIPES[name]), data)
    for implementation, make in loader.implementations(name, data, 1).items():
        batches = list(make()())
        if implementation.startswith(measure.BOUND):
            assert not batches
            continue
        assert [len(batch) for batch in batches] == [4, 2]
        # torchvision's resize of tensors rounds otherwise than Pillow's; ours does not.
        if implementation == "torchvision tensor":
            assert measure.relative_error(batches[0], reference) < 0.02
        else:
            assert torch.equal(batches[0], reference)


@pytest.mark.parametrize("flags", [["--images", "-1"], ["--batch", "0"], ["--recipe", "clip"]])
def test_wrong_flags_end_with_a_message(flags, capsys):
    with pytest.raises(SystemExit):
        loader.main(flags)
    assert flags[0] in capsys.readouterr().err


def test_a_quick_run_writes_every_row(tmp_path, capsys):
    target = tmp_path / "run.json"
    flags = ["--quick", "--images", "6", "--batch", "4", "--recipe", "clip_train", "vilt_eval"]
    loader.main([*flags, "--threads", "2", "--rounds", "1", "--json", str(target)])
    found = json.loads(target.read_text())
    assert not found["meta"]["missing"]
    for name in ("clip_train", "vilt_eval"):
        group = {row["impl"]: row for row in found["rows"] if row["phase"] == f"{name} epoch"}
        assert set(group) == {
            "fastvlp", "fastvlp, Pillow alone", "torchvision PIL", "torchvision tensor",
            "webdataset", "floor (decoding)",
        }  # fmt: skip
        assert all(row["ms"] > 0 and row["cpu_ms"] >= 0 for row in group.values())
        assert group["fastvlp"]["error"] == (0.0 if name == "vilt_eval" else None)
    assert "ms of CPU time an image" in capsys.readouterr().out


def test_the_summary_names_shares():
    def row(name, cpu):
        shape = {"images": 4, "batch": 2}
        return {"op": "loader", "impl": name, "dtype": "uint8", "shape": shape, "ms": 1.0,
                "phase": "clip_eval epoch", "cpu_ms": cpu}  # fmt: skip

    text = loader.summary([row("fastvlp", 1.5), row("torchvision PIL", 3.0), row("tick", 0.0)])
    assert "1.50 ms" in text and "50% of torchvision PIL's 3.00" in text and "tick" not in text
