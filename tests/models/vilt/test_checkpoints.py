"""ViLT checkpoints of other formats, and what their reports say."""

import json

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from fastvlp_tests.vilt_cases import LENGTHS, images, perturb, small, tokens
from safetensors.torch import save_file

from fastvlp.models.checkpoints import initialise_from_vit, load_vilt


def original(**changes):
    """A state dict as the original release has it: its names are this library's."""
    model = small(**changes)
    state = model.state_dict()
    state["text_embeddings.position_ids"] = torch.arange(12)[None]
    return model, state


def loaded(state, **options):
    return load_vilt(state, heads=3, **options)


def same_weights(model, other, names):
    state, expected = model.state_dict(), other.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in names)


@torch.no_grad()
def test_original_checkpoints(tmp_path):
    source, state = original()
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "vilt.ckpt")
    model, report = load_vilt(tmp_path / "vilt.ckpt", heads=3, answers=9)
    assert (report.source, report.missing, report.unused) == ("original ViLT", (), ())
    assert report.loaded == len(model.state_dict()) and not report.reshaped
    assert "layer norm eps 1e-6" in str(report)
    assert not model.training and model.config.tasks == ("mlm", "itm")
    assert (model.config.eps, model.config.text_eps) == (1e-6, 1e-12)
    assert (model.config.image_size, model.config.patch_size) == (32, 8)
    for got, expected in zip(
        model(tokens(), images(), LENGTHS), source(tokens(), images(), LENGTHS), strict=True
    ):
        assert torch.equal(got, expected)


def test_parts_of_other_objectives_are_left_out():
    _, state = original()
    state["mpp_score.decoder.weight"] = torch.ones(3)
    model, report = loaded(state, tasks=("vqa",))
    assert report.unused == tuple(sorted(k for k in state if k.startswith(("mlm", "itm", "mpp"))))
    assert set(report.missing) == {k for k in model.state_dict() if k.startswith("vqa")}
    assert "vqa_classifier is not in the checkpoint" in str(report)
    state["stray.weight"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"(?s)unused.*stray.weight"):
        loaded(state)
    del state["stray.weight"], state["pooler.dense.bias"]
    with pytest.raises(ValueError, match=r"(?s)missing.*pooler.dense.bias"):
        loaded(state)
    assert loaded(state, strict=False)[1].missing == ("pooler.dense.bias",)


def test_nlvr2_gets_a_row_for_the_second_image():
    source, state = original()
    model, report = loaded(state, tasks=("nlvr2",))
    kinds, old = model.token_type_embeddings.weight, source.token_type_embeddings.weight
    assert torch.equal(kinds[:2], old) and torch.equal(kinds[2], old[1])
    assert ("token_type_embeddings.weight", (2, 48), (3, 48)) in report.reshaped
    _, state = original(tasks=("nlvr2", "mlm"))
    model, report = loaded(state, tasks=("mlm",))
    assert len(model.token_type_embeddings.weight) == 2
    assert ("token_type_embeddings.weight", (3, 48), (2, 48)) in report.reshaped


def test_ranking_starts_from_matching():
    source, state = original()
    model, report = loaded(state, tasks=("retrieval",))
    assert torch.equal(model.rank_output.weight, source.itm_score["fc"].weight[1:])
    assert torch.equal(model.rank_output.bias, source.itm_score["fc"].bias[1:])
    assert not report.missing and "row 1 of itm_score.fc" in str(report)


def test_positions_are_resized_bilinearly():
    source, state = original()
    model, report = loaded(state, image_size=48)
    old, new = source.transformer.pos_embed, model.transformer.pos_embed
    square = old[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    expected = F.interpolate(square, (6, 6), mode="bilinear", align_corners=True)
    torch.testing.assert_close(new[:, 1:], expected.flatten(2).mT)
    assert torch.equal(new[:, :1], old[:, :1])
    assert report.reshaped == (("transformer.pos_embed", (1, 17, 48), (1, 37, 48)),)


def hub_folder(path, eps=1e-12, **changes):
    config = transformers.ViltConfig(
        vocab_size=60, max_position_embeddings=12, hidden_size=48, num_hidden_layers=1,
        num_attention_heads=4, intermediate_size=192, image_size=32, patch_size=8,
        layer_norm_eps=eps, hidden_dropout_prob=0.2, max_image_length=7, **changes,
    )  # fmt: skip
    peer = perturb(transformers.ViltForMaskedLM(config))
    state = {k: v.clone() for k, v in peer.state_dict().items()}
    del state["mlm_score.decoder.weight"]
    path.mkdir()
    save_file(state, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config.to_dict()))
    return peer


@torch.no_grad()
def test_folders_of_a_model_hub_bring_their_settings(tmp_path):
    peer = hub_folder(tmp_path / "hub", eps=1e-3)
    model, report = load_vilt(tmp_path / "hub")
    config = model.config
    assert (config.heads, config.dropout, config.max_image_len) == (4, 0.2, 7)
    assert config.eps == config.text_eps == 1e-3
    assert "layer norm eps 0.001" in str(report) and "tied" in str(report)
    expected = peer.mlm_score.decoder.weight
    assert torch.equal(model.mlm_score.decoder.weight, expected)
    assert model.mlm_score.decoder.weight is not model.text_embeddings.word_embeddings.weight
    model, report = load_vilt(tmp_path / "hub" / "model.safetensors", eps=1e-6, tasks=["itm"])
    assert (model.config.eps, model.config.heads, model.config.tasks) == (1e-6, 4, ("itm",))


def test_settings_that_the_model_has_not(tmp_path):
    hub_folder(tmp_path / "hub", hidden_act="relu")
    with pytest.raises(ValueError, match="^settings: expected hidden_act 'gelu', got 'relu'"):
        load_vilt(tmp_path / "hub")


def test_what_is_no_vilt():
    with pytest.raises(ValueError, match="^source: expected the weights of a ViLT"):
        load_vilt({"transformer.cls_token": torch.ones(1, 1, 4)})
    with pytest.raises(ValueError, match="^heads: "):
        load_vilt(original()[1])
    with pytest.raises(ValueError, match="^source: expected the weights of a ViT"):
        initialise_from_vit(small(), {"weight": torch.ones(3)})


def vision(name="vit_base_patch32_384", **changes):
    sizes = dict(embed_dim=48, depth=2, num_heads=3, img_size=24, patch_size=8, num_classes=5)
    return perturb(timm.create_model(name, pretrained=False, **(sizes | changes)))


def test_blocks_start_from_a_vit_of_timm():
    model, before = small(), small()
    peer = vision()
    report = initialise_from_vit(model, peer.state_dict())
    assert report.source == "timm ViT"
    assert report.unused == ("transformer.head.bias", "transformer.head.weight")
    assert report.reshaped == (("transformer.pos_embed", (1, 10, 48), (1, 17, 48)),)
    own = {k for k in model.state_dict() if not k.startswith("transformer.")}
    assert set(report.missing) == own
    same_weights(model, before, own)
    same_weights(model.transformer, peer, model.transformer.state_dict().keys() - {"pos_embed"})


def test_blocks_of_a_vit_compute_what_timm_computes():
    model, peer = small(image_size=24), vision()
    initialise_from_vit(model, peer.state_dict())
    pixels = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        tokens_of = model.embed_images(pixels).rows.unflatten(0, (2, -1))
        for block in model.transformer.blocks:
            tokens_of = block(tokens_of)
        expected = peer.forward_features(pixels)
        got = model.transformer.norm(tokens_of)
    assert (got - expected).norm() <= 1e-5 * expected.norm()


def test_a_distilled_deit_lends_all_but_its_second_token(tmp_path):
    peer = vision("deit_base_distilled_patch16_224")
    torch.save({"model": peer.state_dict()}, tmp_path / "deit.pth")
    model = small(image_size=24, eps=1e-12)
    report = initialise_from_vit(model, tmp_path / "deit.pth")
    expected = torch.cat([peer.pos_embed[:, :1], peer.pos_embed[:, 2:]], 1)
    assert torch.equal(model.transformer.pos_embed, expected)
    assert "distillation token" in str(report) and "eps 1e-6" in str(report)
    assert all(name.startswith("transformer.head") for name in report.unused)
