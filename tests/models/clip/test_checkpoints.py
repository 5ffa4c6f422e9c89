"""Loading OpenAI's, open_clip's and transformers' CLIP: formats, sizes, activations, refusals."""

import json

import open_clip
import pytest
import torch
from fastvlp_tests.clip_cases import TINY, inputs, tiny_open_clip, transformers_model
from safetensors.torch import save_file
from torch import nn

from fastvlp.losses import ClipLoss
from fastvlp.models.checkpoints import load_clip
from fastvlp.models.clip import CONFIGS

QUICK = {"quick_gelu": True}
# What open_clip's weights do not tell where the vocabulary is none of the published ones.
GELU = {"activation": "gelu", "end_token": "largest"}
RESNET = {"vision_cfg": {"image_size": 64, "width": 8, "layers": [1, 2, 1, 1], "patch_size": None}}


@torch.no_grad()
def assert_same(ours, peer, count=3):
    """Features of a peer with open_clip's interface."""
    assert not ours.training and all(p.dtype == torch.float32 for p in ours.parameters())
    images, tokens = inputs(ours.config, count)
    for reference in (False, True):
        ours.use_reference(reference)
        for got, expected in zip(ours(images, tokens), peer(images, tokens), strict=True):
            assert (got - expected).norm() <= 1e-5 * expected.norm()


def rounded(state):
    return {k: v.half().float() if v.is_floating_point() else v for k, v in state.items()}


def openai(state):
    """As in OpenAI's files: matrices in half precision, sizes beside them."""
    half = {k: v.half() if v.dim() > 1 else v for k, v in state.items()}
    sizes = {"input_resolution": 32, "context_length": 20, "vocab_size": 120}
    return half | {k: torch.tensor(v) for k, v in sizes.items()}


def archive(state, path):
    """The tensors in a TorchScript archive, in modules of their names."""
    root = nn.Module()
    for key, value in state.items():
        *parents, leaf = key.split(".")
        module = root
        for parent in parents:
            if parent not in dict(module.named_children()):
                module.add_module(parent, nn.Module())
            module = getattr(module, parent)
        module.register_buffer(leaf, value)
    torch.jit.script(root).save(path)


@pytest.mark.parametrize("tower", [{}, RESNET], ids=["vit", "resnet"])
def test_openai_archives(tmp_path, tower):
    peer = tiny_open_clip(**QUICK, **tower)
    peer.load_state_dict(rounded(peer.state_dict()))
    archive(openai(peer.state_dict()), tmp_path / "model.pt")
    ours, report = load_clip(tmp_path / "model.pt")
    assert report.source == "OpenAI CLIP" and not report.missing + report.unused
    assert "activation quick_gelu, from OpenAI's release" in report.notes
    assert ours.config.activation == "quick_gelu"
    assert_same(ours, peer)
    with pytest.raises(ValueError, match="contradict"):
        load_clip(tmp_path / "model.pt", **GELU)


@pytest.mark.parametrize("kind", [open_clip.model.CLIP, open_clip.model.CustomTextCLIP])
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_open_clip(tmp_path, kind, quick_gelu):
    peer = tiny_open_clip(kind, quick_gelu=quick_gelu, nonscalar_logit_scale=True)
    activation = "quick_gelu" if quick_gelu else "gelu"
    state = {f"module.{key}": value for key, value in peer.state_dict().items()}
    torch.save({"epoch": 1, "name": "run", "state_dict": state}, tmp_path / "epoch_1.pt")
    ours, report = load_clip(tmp_path / "epoch_1.pt", **GELU | {"activation": activation})
    assert report.source == "open_clip CLIP" and report.loaded == len(state)
    assert_same(ours, peer)
    by_config, _ = load_clip(peer.state_dict(), config=TINY | {"quick_gelu": quick_gelu})
    assert by_config.config == ours.config
    folder = tmp_path / "hub"
    folder.mkdir()
    save_file(peer.state_dict(), folder / "open_clip_model.safetensors")
    described = {"model_cfg": TINY | {"quick_gelu": quick_gelu}, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    for path in (folder, folder / "open_clip_model.safetensors"):
        found, report = load_clip(path)
        assert found.config == ours.config
        assert f"activation {activation}, from open_clip_config.json" in report.notes


def test_open_clips_activation_is_asked_for():
    state = tiny_open_clip().state_dict()
    with pytest.raises(ValueError, match="^activation: .*they do not show.*quick_gelu"):
        load_clip(state)
    with pytest.raises(ValueError, match="contradict"):
        load_clip(state, config=TINY | QUICK, **GELU)
    with pytest.raises(ValueError, match="^activation must be"):
        load_clip(state, **GELU | {"activation": "relu"})


def test_names():
    """A name gives the sizes, which must fit, and only -quickgelu the activation."""
    state = tiny_open_clip().state_dict()
    with pytest.raises(ValueError, match="^activation"):
        load_clip(state, name="tiny")
    for name in ("ViT-B-32-quickgelu", "RN50-quickgelu"):
        with pytest.raises(ValueError, match="contradict"):
            load_clip(state, name=name, **GELU)
    with pytest.raises(ValueError, match="shapes differ"):
        load_clip(state, name="tiny", **GELU)
    with pytest.raises(ValueError, match="^name: expected one of"):
        load_clip(state, name="ViT-Q-7")
    with pytest.raises(ValueError, match="got both"):
        load_clip(state, name="tiny", config=CONFIGS["tiny"])


def test_heads_that_are_not_64_wide():
    """As in ViT-H/14, whose width tells it; a width without a rule asks for the configuration."""
    vision = TINY["vision_cfg"] | {"width": 1280, "layers": 1, "head_width": 80, "mlp_ratio": 0.1}
    peer = tiny_open_clip(vision_cfg=vision)
    ours, report = load_clip(peer.state_dict(), **GELU)
    assert ours.config.vision_heads == 16
    assert any("16 vision heads, from the width 1280" in note for note in report.notes)
    assert_same(ours, peer, count=1)
    vision = TINY["vision_cfg"] | {"width": 96, "head_width": 48}
    peer = tiny_open_clip(vision_cfg=vision)
    with pytest.raises(ValueError, match="heads cannot be guessed for a width of 96"):
        load_clip(peer.state_dict(), **GELU)
    ours, _ = load_clip(peer.state_dict(), config=TINY | {"vision_cfg": vision})
    assert_same(ours, peer)


def test_positions_are_resized_as_in_open_clip():
    state = tiny_open_clip().state_dict()
    larger = tiny_open_clip(
        vision_cfg=TINY["vision_cfg"] | {"image_size": 48},
        text_cfg=TINY["text_cfg"] | {"context_length": 33},
    )
    expected = dict(state)
    open_clip.model.resize_pos_embed(expected, larger)
    open_clip.model.resize_text_pos_embed(expected, larger)
    larger.load_state_dict(expected)
    ours, report = load_clip(state, **GELU, image_size=48, context_length=33)
    assert report.reshaped == (
        ("visual.positional_embedding", (17, 128), (37, 128)),
        ("positional_embedding", (20, 64), (33, 64)),
    )
    assert_same(ours, larger)
    same, report = load_clip(state, **GELU, image_size=32, context_length=20)
    assert not report.reshaped and same.config.image_size == 32
    with pytest.raises(ValueError, match="^image_size: the attention pool"):
        load_clip(tiny_open_clip(**RESNET).state_dict(), **GELU, image_size=96)


def test_strictness():
    state = tiny_open_clip().state_dict()
    del state["visual.ln_post.bias"]
    state["surplus"] = torch.ones(1)
    with pytest.raises(ValueError, match=r"(?s)missing \(1\).*ln_post.bias.*unused \(1\).*surplus"):
        load_clip(state, **GELU)
    _, report = load_clip(state, **GELU, strict=False)
    assert report.missing == ("visual.ln_post.bias",) and report.unused == ("surplus",)


@pytest.mark.parametrize("key, what", [
    ("visual.trunk.patch_embed.proj.weight", "timm"),
    ("text.transformer.embeddings.word_embeddings.weight", "text tower of transformers"),
    ("text.proj.0.weight", "text tower of transformers"),
    ("text_decoder.ln_final.weight", "CoCa"),
    ("visual.attn_pool.query", "attentional pooling"),
    ("text.cls_emb", "class token"),
    ("text.text_projection.weight", "projection with a bias"),
    ("logit_bias", "SigLIP"),
    ("vision_model.head.probe", "SigLIP"),
    ("visual.transformer.resblocks.0.ls_1.gamma", "layer scale"),
])  # fmt: skip
def test_other_architectures_are_refused(key, what):
    state = tiny_open_clip().state_dict() | {key: torch.ones(1)}
    with pytest.raises(ValueError, match=f"^state: the checkpoint has .*{what}"):
        load_clip(state, **GELU, strict=False)


@pytest.mark.parametrize("vision", [
    {"timm_model_name": "vit_base"}, {"pool_type": "avg"}, {"no_ln_pre": True},
    {"norm_kwargs": {"eps": 1e-6}},
])  # fmt: skip
def test_other_configurations_are_refused(vision):
    described = TINY | {"vision_cfg": TINY["vision_cfg"] | vision}
    with pytest.raises(ValueError, match=f"^config: vision_cfg has {next(iter(vision))}"):
        load_clip(tiny_open_clip().state_dict(), config=described)


def test_what_is_no_clip():
    with pytest.raises(ValueError, match="^state: expected a CLIP of OpenAI"):
        load_clip({"bert.pooler.weight": torch.ones(1)})
    with pytest.raises(ValueError, match="^config: expected a ClipConfig"):
        load_clip(tiny_open_clip().state_dict(), config={"hidden_size": 3})


@pytest.mark.parametrize("activation, eos", [("quick_gelu", 119), ("gelu", 2), ("gelu", 100)])
@torch.no_grad()
def test_transformers(tmp_path, activation, eos):
    """Towers, features and loss; the end token by its id, or by the early files' wrong id 2."""
    peer = transformers_model(activation, eos)
    peer.save_pretrained(tmp_path)
    ours, report = load_clip(tmp_path)
    assert report.source == "transformers CLIPModel" and not report.missing + report.unused
    assert ours.config.activation == activation
    assert ours.config.end_token == (100 if eos == 100 else None)
    assert f"activation {activation}, from config.json" in report.notes
    images, tokens = inputs(ours.config)
    if eos == 100:  # the first of several, below ids that were added later
        tokens[torch.arange(3), tokens.argmax(1)] = 100
        tokens[:, -4:] = torch.tensor([100, 119, 100, 118])
    out = peer(pixel_values=images, input_ids=tokens, return_loss=True)
    for reference in (False, True):
        ours.use_reference(reference)
        image, text, scale = ours(images, tokens)
        for got, expected in (
            (ours.encode_image(images), peer.get_image_features(images).pooler_output),
            (ours.encode_text(tokens), peer.get_text_features(tokens).pooler_output),
            (image, out.image_embeds),
            (text, out.text_embeds),
            (scale * text @ image.T, out.logits_per_text),
            (ClipLoss()(image, text, scale), out.loss),
        ):
            assert (got - expected).norm() <= 1e-5 * expected.norm()


def test_transformers_without_its_configuration():
    """The state dict alone says neither activation nor heads; position_ids are no weights."""
    peer = transformers_model()
    state = peer.state_dict() | {"text_model.embeddings.position_ids": torch.arange(20)[None]}
    with pytest.raises(ValueError, match="^activation"):
        load_clip(state, strict=False, config=None, name="tiny")
    ours, report = load_clip(state, config=peer.config.to_dict())
    assert ours.config.vision_heads == 2 and not report.unused
    with pytest.raises(ValueError, match="contradict"):
        load_clip(state, config=peer.config.to_dict(), **GELU)


def test_transformers_configurations_that_are_refused():
    peer = transformers_model()
    described = peer.config.to_dict()
    for side, change, match in (
        ("vision", {"hidden_act": "gelu"}, "hidden_act"),
        ("text", {"layer_norm_eps": 1e-6}, "layer_norm_eps"),
        ("vision", {"num_channels": 1}, "num_channels"),
    ):
        changed = described | {f"{side}_config": described[f"{side}_config"] | change}
        with pytest.raises(ValueError, match=f"^config: expected {match}"):
            load_clip(peer.state_dict(), config=changed)
