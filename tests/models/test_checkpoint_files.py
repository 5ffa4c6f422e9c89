"""Reading, resizing and applying state dicts, and saving models with tied weights."""

import json
import os
import stat
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from fastvlp.models import base, clip
from fastvlp.models.checkpoints import (
    apply,
    read_state_dict,
    resize_grid_positions,
    resize_text_positions,
)

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2)}


def same(got, expected=STATE):
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[k], expected[k]) for k in expected)


def test_safetensors_pickles_containers_and_prefixes(tmp_path):
    save_file(STATE, tmp_path / "plain.safetensors")
    same(read_state_dict(tmp_path / "plain.safetensors"))
    wrapped = {f"module._orig_mod.{k}": v for k, v in STATE.items()}
    torch.save({"epoch": 3, "state_dict": wrapped, "optimizer": {}}, tmp_path / "run.pt")
    same(read_state_dict(tmp_path / "run.pt"))
    torch.save({"model": STATE}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    same(read_state_dict(tmp_path / "old.pth"))


def test_torchscript_archives(tmp_path):
    layer = nn.Linear(3, 2)
    torch.jit.script(layer).save(tmp_path / "script.pt")
    same(read_state_dict(tmp_path / "script.pt"), layer.state_dict())


def test_folders_of_a_model_hub(tmp_path):
    for i, name in enumerate(STATE):
        save_file({name: STATE[name]}, tmp_path / f"part-{i}.safetensors")
    index = {"weight_map": {name: f"part-{i}.safetensors" for i, name in enumerate(STATE)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    same(read_state_dict(tmp_path))
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        read_state_dict((tmp_path / "empty").mkdir() or tmp_path / "empty")


class Thing:
    pass


def test_what_is_no_checkpoint(tmp_path):
    torch.save({"model": Thing()}, tmp_path / "code.pt")
    with pytest.raises(ValueError, match="cannot be read as plain weights"):
        read_state_dict(tmp_path / "code.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="expected a state dict"):
        read_state_dict(tmp_path / "list.pt")
    with pytest.raises(FileNotFoundError, match="absent"):
        read_state_dict(tmp_path / "absent.pt")


def test_apply_is_strict_and_leaves_the_model_alone_when_it_refuses():
    model = nn.ModuleDict({"a": nn.Linear(3, 2)})
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"(?s)missing \(1\):.*a.bias.*unused \(1\):.*a.gain"):
        apply(model, {"a.weight": STATE["a.weight"], "a.gain": torch.ones(2)}, source="test")
    with pytest.raises(ValueError, match=r"a.weight: checkpoint \(3, 2\), model \(2, 3\)"):
        apply(model, {**STATE, "a.weight": torch.ones(3, 2)}, source="test", strict=False)
    same(model.state_dict(), before)
    address = model["a"].weight.data_ptr()
    report = apply(
        model, STATE | {"queue_ptr": torch.zeros(1)}, source="test", may_skip=["queue*"],
        notes=["gelu"],
    )  # fmt: skip
    same(model.state_dict())
    assert model["a"].weight.data_ptr() == address
    assert (report.loaded, report.unused) == (2, ("queue_ptr",))
    assert "note: gelu" in str(report)
    report = apply(model, {"a.bias": torch.zeros(2)}, source="test", strict=False)
    assert report.missing == ("a.weight",) and not model["a"].bias.any()


@pytest.mark.parametrize("options", [
    {"mode": "bicubic", "antialias": True, "align_corners": False},
    {"mode": "bicubic", "align_corners": False},
    {"mode": "bilinear", "align_corners": True},
])  # fmt: skip
def test_grid_positions_are_resized_beside_the_class_token(options):
    positions = torch.randn(1, 1 + 49, 5)
    antialias = options.get("antialias", False)
    got = resize_grid_positions(positions, (4, 9), mode=options["mode"], antialias=antialias)
    square = positions[:, 1:].view(1, 7, 7, 5).permute(0, 3, 1, 2)
    expected = F.interpolate(square, (4, 9), **options).permute(0, 2, 3, 1).reshape(1, 36, 5)
    assert torch.equal(got[:, :1], positions[:, :1])
    torch.testing.assert_close(got[:, 1:], expected, rtol=0, atol=0)
    assert resize_grid_positions(positions, (7, 7)) is positions
    with pytest.raises(ValueError, match="square number"):
        resize_grid_positions(positions[:, :-1], (4, 4))


def test_text_positions_are_stretched_linearly():
    line = torch.arange(8.0)[:, None].expand(8, 3)
    got = resize_text_positions(line, 16)
    assert got.shape == (16, 3)
    torch.testing.assert_close(got[1:-1, 0].diff(), torch.full((13,), 0.5))
    assert resize_text_positions(line, 8) is line


@dataclass(frozen=True)
class TiedConfig:
    width: int = 4
    sizes: tuple[int, ...] = (1, 2)


class Tied(base.Model):
    kind = "tied"
    config_type = TiedConfig

    def __init__(self, config):
        super().__init__(config)
        self.first = nn.Linear(config.width, config.width)
        self.second = nn.Linear(config.width, config.width)
        self.second.weight = self.first.weight


def test_tied_weights_survive_saving(tmp_path):
    model = Tied(TiedConfig(width=3))
    base.save(model, tmp_path / "m")
    loaded = base.load(tmp_path / "m")
    assert loaded.config == model.config and not loaded.training
    assert loaded.second.weight is loaded.first.weight
    same(loaded.state_dict(), model.state_dict())
    with pytest.raises(ValueError, match="expected clip"):
        base.load(tmp_path / "m", "clip")


def test_saved_files_have_the_mode_of_new_files(tmp_path):
    before = os.umask(0o027)
    try:
        base.save(clip.create("tiny", vocab_size=40, context_length=6), tmp_path / "m")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert modes == {0o640} and len(list(tmp_path.iterdir())) == 2
