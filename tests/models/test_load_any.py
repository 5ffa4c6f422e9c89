"""A model from any of the forms that models are saved in."""

import dataclasses

import pytest
import torch
from fastvlp_tests.albef_peer import CONFIG, PeerAlbef
from fastvlp_tests.clip_cases import tiny_open_clip
from fastvlp_tests.vilt_cases import small

from fastvlp.models import base, clip
from fastvlp.models.albef import Albef
from fastvlp.models.checkpoints import load_any


@pytest.mark.parametrize("name", ["model", "model.safetensors", "model.json", ""])
def test_what_the_library_saved(tmp_path, name):
    model = clip.create("tiny", vocab_size=40, context_length=6)
    base.save(model, tmp_path / "model")
    found, report = load_any(tmp_path / name)
    assert report is None and found.config == model.config and not found.training
    assert all(torch.equal(v, found.state_dict()[k]) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match="activation: expected none"):
        load_any(tmp_path / name, activation="gelu")


@pytest.mark.parametrize("name", ["model", "model.safetensors", ""])
def test_a_damaged_description_of_what_the_library_saved_is_named(tmp_path, name):
    base.save(clip.create("tiny", vocab_size=40, context_length=6), tmp_path / "model")
    (tmp_path / "model.json").write_text('{"kind": "cl')
    with pytest.raises(ValueError, match=r"model\.json is of another format, or is damaged"):
        load_any(tmp_path / name)


def test_a_clip_of_open_clip(tmp_path):
    torch.save(tiny_open_clip().state_dict(), tmp_path / "clip.pt")
    with pytest.raises(ValueError, match="activation"):
        load_any(tmp_path / "clip.pt")
    with pytest.raises(ValueError, match="^end_token: .* vocabulary of 120"):
        load_any(tmp_path / "clip.pt", activation="gelu")
    with pytest.raises(ValueError, match="token_types: expected none, clip"):
        load_any(tmp_path / "clip.pt", activation="gelu", token_types=False)
    found, report = load_any(tmp_path / "clip.pt", activation="gelu", end_token="largest")
    assert found.kind == "clip" and report.source == "open_clip CLIP"


def test_a_vilt(tmp_path):
    model = small(width=64, heads=1)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "vilt.ckpt")
    found, report = load_any(tmp_path / "vilt.ckpt")
    assert found.kind == "vilt" and report.source == "original ViLT"
    with pytest.raises(ValueError, match="activation: expected none, vilt has one"):
        load_any(tmp_path / "vilt.ckpt", activation="gelu")


def test_an_albef_with_the_sizes_of_its_weights(tmp_path):
    torch.save({"model": PeerAlbef().checkpoint()}, tmp_path / "albef.pth")
    found, report = load_any(tmp_path / "albef.pth")
    # Without what training needs; dropout has no weights.
    same = {"dropout", "attention_dropout", "queue_size", "pretraining"}
    for field in {f.name for f in dataclasses.fields(CONFIG)} - same:
        assert getattr(found.config, field) == getattr(CONFIG, field), field
    assert found.momentum is None and not found.training and not report.missing
    larger, report = load_any(tmp_path / "albef.pth", image_size=96)
    assert larger.config.image_size == 96 and report.reshaped


def test_other_checkpoints_are_refused(tmp_path):
    torch.save({"a.weight": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="path: expected a CLIP, ViLT or ALBEF .* such as"):
        load_any(tmp_path / "other.pt")
    state = Albef(CONFIG).state_dict()
    state = {"visual_encoder.pos_embed": state["student.visual_encoder.pos_embed"]}
    torch.save(state, tmp_path / "part.pt")
    with pytest.raises(ValueError, match="state: expected the weights of an ALBEF, found no"):
        load_any(tmp_path / "part.pt")
