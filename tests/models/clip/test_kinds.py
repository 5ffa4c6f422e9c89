"""What CLIP checkpoints leave unsaid: where texts are read, the kind of model, what is missing."""

import json

import open_clip
import pytest
import torch
import transformers
from fastvlp_tests.clip_cases import TINY, inputs, perturb, tiny_open_clip
from safetensors.torch import save_file

from fastvlp.models.checkpoints import load_any, load_clip

TOWER = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
    projection_dim=32,
)  # fmt: skip
TEXT = TOWER | {"max_position_embeddings": 20, "vocab_size": 120, "bos_token_id": 0}
VISION = TOWER | {"image_size": 32, "patch_size": 16}


def texts(end, count=3):
    """Rows with larger ids before and after their end token, and a second end token."""
    torch.manual_seed(2)
    tokens = torch.randint(5, 120, (count, 20))
    for row, place in enumerate((4, 9, 14)):
        tokens[row, place:] = 1
        tokens[row, place] = tokens[row, place + 2] = end
    return tokens


def same_text(ours, tokens, expected):
    for reference in (False, True):
        ours.use_reference(reference)
        error = (ours.encode_text(tokens) - expected).norm() / expected.norm()
        assert error <= 1e-5


@pytest.mark.parametrize("eos", [2, 119])
@torch.no_grad()
def test_metaclip_2_reads_a_text_at_its_end_token(tmp_path, eos):
    config = transformers.MetaClip2Config(
        text_config=TEXT | {"eos_token_id": eos}, vision_config=VISION, projection_dim=32
    )
    peer = perturb(transformers.MetaClip2Model(config))
    peer.save_pretrained(tmp_path)
    ours, report = load_clip(tmp_path)
    assert not report.missing + report.unused
    tokens = texts(eos)
    same_text(ours, tokens, peer.get_text_features(tokens).pooler_output)
    images = inputs(ours.config)[0]
    expected = peer.get_image_features(images).pooler_output
    assert (ours.encode_image(images) - expected).norm() <= 1e-5 * expected.norm()
    found, _ = load_any(tmp_path)
    assert found.config == ours.config


def worldwide(vocab_size=120, eos_id=2):
    text = TINY["text_cfg"] | {"pool_type": "eos", "eos_id": eos_id, "vocab_size": vocab_size}
    described = TINY | {"text_cfg": text}
    return described, tiny_open_clip(text_cfg=text)


@torch.no_grad()
def test_open_clips_end_tokens(tmp_path):
    described, peer = worldwide()
    tokens = texts(2)
    expected = peer.encode_text(tokens)
    ours, _ = load_clip(peer.state_dict(), config=described)
    same_text(ours, tokens, expected)
    ours, _ = load_clip(peer.state_dict(), activation="gelu", end_token=2)
    same_text(ours, tokens, expected)
    with pytest.raises(ValueError, match="^end_token: .*a vocabulary of 120 is none of"):
        load_clip(peer.state_dict(), activation="gelu")
    with pytest.raises(ValueError, match="^end_token: the model's configuration says 2"):
        load_clip(peer.state_dict(), config=described, end_token="largest")
    save_file(peer.state_dict(), tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": described}))
    same_text(load_clip(tmp_path)[0], tokens, expected)


@pytest.mark.parametrize("vocab_size, end", [(901_629, 2), (250_100, 1), (49_408, None)])
def test_published_vocabularies_tell_the_end_token(vocab_size, end):
    state = tiny_open_clip().state_dict()
    state["token_embedding.weight"] = torch.zeros(1).expand(vocab_size, 64)
    from fastvlp.models.checkpoints._clip_config import config_of_shapes

    config, notes = config_of_shapes(state)
    assert (config.vocab_size, config.end_token) == (vocab_size, end)
    assert any(f"end token {end}" in note for note in notes) == (end is not None)


def test_the_end_tokens_of_open_clips_configurations():
    """Every plain configuration with another rule of reading has a vocabulary that tells it."""
    from fastvlp.models.checkpoints._clip_config import END_TOKENS

    for name in open_clip.list_models():
        text = open_clip.get_model_config(name).get("text_cfg", {})
        rule = text.get("pool_type", "argmax")
        if "hf_model_name" in text or text.get("embed_cls"):
            continue
        found = END_TOKENS.get(text.get("vocab_size", 49_408), "refused")
        expected = {"argmax": "largest", "eos": text.get("eos_id", 2), "last": "refused"}[rule]
        assert found == expected, name


def refused(described, match):
    with pytest.raises(ValueError, match=f"^config: {match}"):
        load_clip(tiny_open_clip().state_dict(), config=described)


@pytest.mark.parametrize("tower, change", [
    ("text_cfg", {"pool_type": "last"}), ("text_cfg", {"pool_type": "tok"}),
    ("text_cfg", {"proj_type": "none"}), ("text_cfg", {"no_causal_mask": True}),
    ("vision_cfg", {"pool_type": ""}), ("vision_cfg", {"pos_embed_type": "sin_cos_2d"}),
    ("vision_cfg", {"something_new": 3}),
])  # fmt: skip
def test_open_clip_settings_that_change_the_function_are_refused(tower, change):
    refused(TINY | {tower: TINY[tower] | change}, f"{tower} has {next(iter(change))}")


def test_other_kinds_are_refused():
    refused(TINY | {"init_logit_bias": -10}, "model_cfg has init_logit_bias=-10")
    refused(TINY | {"multimodal_cfg": {"width": 8}}, "model_cfg has multimodal_cfg")
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION).to_dict()
    for kind in ("altclip", "chinese_clip", "siglip", "groupvit"):
        refused(
            config | {"model_type": kind}, f"expected model_type clip or metaclip_2, got '{kind}"
        )
    config["text_config"]["eos_token_id"] = [2, 3]
    refused(config, "expected eos_token_id .* to be one id")


BERT = TOWER | {"vocab_size": 50, "max_position_embeddings": 20}
MODELS = {
    "ChineseCLIPModel": lambda: transformers.ChineseCLIPModel(
        transformers.ChineseCLIPConfig(text_config=BERT, vision_config=VISION, projection_dim=32)
    ),
    "AltCLIPModel": lambda: transformers.AltCLIPModel(
        transformers.AltCLIPConfig(
            text_config=BERT | {"project_dim": 32}, vision_config=VISION, projection_dim=32
        )
    ),
    "BlipModel": lambda: transformers.BlipModel(
        transformers.BlipConfig(text_config=BERT, vision_config=VISION, projection_dim=32)
    ),
    "CLIPVisionModelWithProjection": lambda: transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(**VISION)
    ),
    "CLIPTextModelWithProjection": lambda: transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(**TEXT)
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_is_like_clip_is_refused_with_a_reason(tmp_path, name):
    MODELS[name]().save_pretrained(tmp_path)
    reason = "lacks" if "Projection" in name else "the checkpoint has"
    for load in (load_clip, load_any):
        with pytest.raises(ValueError, match=f"^state: .*{reason}"):
            load(tmp_path)


def test_a_tensor_whose_lack_changes_the_function_is_not_waved_through():
    """CLIPA has no norm before its blocks; strict=False does not pass over it, nor is proposed."""
    described = TINY | {"vision_cfg": TINY["vision_cfg"] | {"no_ln_pre": True}}
    state = tiny_open_clip(vision_cfg=described["vision_cfg"]).state_dict()
    for strict in (True, False):
        with pytest.raises(ValueError, match="image tower .*ln_pre.*CLIPA") as caught:
            load_clip(state, activation="gelu", end_token="largest", strict=strict)
        assert "strict" not in str(caught.value)
    state = tiny_open_clip().state_dict()
    del state["visual.ln_post.bias"]
    with pytest.raises(ValueError, match="without visual.ln_post.bias .*another arch") as caught:
        load_clip(state, config=TINY)
    assert "strict" not in str(caught.value)
