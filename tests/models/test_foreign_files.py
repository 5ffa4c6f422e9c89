"""Files that are no plain checkpoints: archives with code, damaged, mistaken and endless ones."""

import json
import re
import zipfile

import pytest
import torch
from torch import nn

from fastvlp.models import base, clip
from fastvlp.models.checkpoints import apply, read_state_dict


class Tower(nn.Module):
    """Parameters and buffers of several dtypes and layouts, one of them twice, one empty."""

    def __init__(self):
        super().__init__()
        self.first, self.narrow = nn.Linear(3, 2), nn.Linear(2, 2).half()
        self.again = self.first
        self.register_buffer("size", torch.tensor(224))
        self.register_buffer("part", torch.arange(12.0).view(3, 4).T[1:])
        self.register_buffer("nothing", torch.empty(0))

    def forward(self, x):
        return self.first(x) + torch.ones(2)


class RunsCode(nn.Module):
    """When TorchScript loads it, it prints."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    @torch.jit.export
    def __getstate__(self):
        return (self.weight, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]):
        self.weight = state[0]
        self.training = state[1]
        print("code ran")

    def forward(self, x):
        return x * self.weight


OLD = "ignore:`torch.jit"


@pytest.mark.filterwarnings(OLD)
@pytest.mark.parametrize("compiled", [
    torch.jit.script, lambda module: torch.jit.trace(module, torch.ones(1, 3)),
], ids=["scripted", "traced"])  # fmt: skip
def test_tensors_are_read_as_data(tmp_path, monkeypatch, compiled):
    path = tmp_path / "model.pt"
    compiled(Tower()).save(path)
    expected = torch.jit.load(path).state_dict()
    monkeypatch.setattr(torch.jit, "load", None)
    found = read_state_dict(path)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
    found["first.weight"].zero_()


@pytest.mark.filterwarnings(OLD)
def test_code_does_not_run(tmp_path, capfd):
    torch.jit.script(RunsCode()).save(tmp_path / "code.pt")
    torch.jit.load(tmp_path / "code.pt")
    assert "code ran" in capfd.readouterr().out
    with pytest.raises(ValueError, match="path: .*a method of its own"):
        read_state_dict(tmp_path / "code.pt")
    assert "code ran" not in capfd.readouterr().out


@pytest.mark.parametrize("pickled, reason", [
    (b"\x80\x02cos\nsystem\nX\x08\x00\x00\x00touch runq\x00\x85R.", "holds os.system"),
    (b"\x80\x02cbuiltins\neval\n.", "holds builtins.eval"),
    (b"\x80\x02c__torch__\nA\n)\x81q\x00}X\x01\x00\x00\x00ah\x00sb.", "without end"),
    (b"\x80\x02c__torch__\nA\n)", "cannot be read as plain weights"),
])  # fmt: skip
def test_forged_archives_are_refused(tmp_path, monkeypatch, pickled, reason):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("forged.pt", "w") as archive:
        archive.writestr("forged/data.pkl", pickled)
        archive.writestr("forged/constants.pkl", b"\x80\x02).")
    with pytest.raises(ValueError, match=f"path: .*{reason}"):
        read_state_dict("forged.pt")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_holds_itself_is_refused(tmp_path):
    inner = {"epoch": 1}
    inner["model"] = {"state_dict": inner}
    torch.save(inner, tmp_path / "endless.pt")
    with pytest.raises(ValueError, match="holds itself"):
        read_state_dict(tmp_path / "endless.pt")


class Settings:
    pass


def truncated(path):
    torch.save({"a": torch.ones(10_000)}, path)
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize("name, content, message", [
    ("a.pt", b"", "is empty"),
    ("a.safetensors", b"", "is empty"),
    ("a.bin", b"<!DOCTYPE html><html>Not found</html>", "a web page"),
    ("a.safetensors", b"\n<html>", "a web page"),
    ("a.pt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "run git lfs pull"),
    ("train.parquet", b"PAR1" + bytes(3_000_000), "a Parquet file"),
    ("a.pth", b"\x80\x02", "damaged or cut short"),
    ("a.pth", b"hello world " * 9, "damaged or cut short"),
    ("a.safetensors", bytes(100), "damaged or cut short"),
    ("a.safetensors", b"\x20" + bytes(7) + b"{" + bytes(40), "damaged or cut short"),
    ("a.pt", truncated, "damaged or cut short"),
    ("a.pt", lambda path: torch.save({"args": Settings()}, path),
     r"holds \S*test_foreign_files.Settings, .*save the weights alone"),
    ("a.pt", lambda path: torch.save({"epoch": 3}, path), "no tensors but .*epoch"),
    ("a.pt", lambda path: torch.save(torch.ones(2), path), "got Tensor"),
])  # fmt: skip
def test_what_is_wrong_with_a_file_is_said_in_a_line(tmp_path, name, content, message):
    path = tmp_path / name
    content(path) if callable(content) else path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^path: .*{message}") as caught:
        read_state_dict(path)
    said = str(caught.value)
    assert "weights_only" not in said and "\n" not in said and len(said) < 400 + len(str(tmp_path))


def test_other_zip_files_and_broken_indexes_are_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("weights/model.bin", b"x")
    with pytest.raises(ValueError, match=r"zip file with no weights.*weights/model\.bin"):
        read_state_dict(tmp_path / "a.zip")
    index = tmp_path / "model.safetensors.index.json"
    for content in ("{", "[]", "{}", json.dumps({"weight_map": {"a": "../other.safetensors"}})):
        index.write_text(content)
        with pytest.raises(ValueError, match=f"path: .*{re.escape(index.name)}"):
            read_state_dict(tmp_path)


@pytest.mark.parametrize("prefix", [
    "_orig_mod.module.", "module._orig_mod.", "model.", "model._orig_mod.module.",
])  # fmt: skip
def test_prefixes_of_wrappers_in_any_order(tmp_path, prefix):
    state = {"a.weight": torch.ones(2), "model_scale": torch.ones(1)}
    torch.save({"state_dict": {prefix + k: v for k, v in state.items()}}, tmp_path / "wrapped.ckpt")
    assert read_state_dict(tmp_path / "wrapped.ckpt").keys() == state.keys()
    mixed = {"model.a": torch.ones(1), "b": torch.ones(1)}
    torch.save(mixed, tmp_path / "mixed.pt")
    assert read_state_dict(tmp_path / "mixed.pt").keys() == mixed.keys()


def test_damaged_models_of_our_own_are_named(tmp_path):
    model = clip.create("tiny", vocab_size=40, context_length=6)
    weights, config = tmp_path / "m.safetensors", tmp_path / "m.json"

    def refused(file, content, message):
        base.save(model, tmp_path / "m")
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"^path: .*{message}"):
            base.load(tmp_path / "m")

    base.save(model, tmp_path / "m")
    described = json.loads(config.read_text())
    refused(weights, weights.read_bytes()[:500], "m.safetensors is .* damaged or cut short")
    refused(config, b"{", "m.json is .* damaged or cut short")
    refused(config, b"[]", "expected an object in .*m.json, got list")
    refused(config, json.dumps(described | {"new": 1}).encode(), "does not fit m.json.*'new'")
    refused(config, json.dumps(described | {"embed_dim": 8}).encode(), "does not fit m.json")


def test_errors_of_large_models_stay_short():
    model = nn.ModuleList(nn.Linear(2, 2) for _ in range(500))
    for state in ({"a": torch.ones(1)}, {k: v[:1] for k, v in model.state_dict().items()}):
        with pytest.raises(ValueError, match="more") as caught:
            apply(model, state, source="test")
        assert len(str(caught.value)) < 2000
