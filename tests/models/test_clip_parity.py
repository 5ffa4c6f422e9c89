"""The same weights give the same features as in open_clip and transformers."""

import open_clip
import pytest
import torch
import transformers
from tolerance import assert_as_accurate, epsilon

from fastvlp.models import clip

SIZES = {
    "ViT-B/32": "ViT-B-32-quickgelu",
    "ViT-B/16": "ViT-B-16-quickgelu",
    "ViT-L/14": "ViT-L-14-quickgelu",
    "ViT-L/14@336px": "ViT-L-14-336-quickgelu",
}


def perturb(model):
    """No parameter keeps a value that hides a mistake, such as a bias of zero."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


def inputs(config, count=3):
    """Images, and texts of several lengths that end in the largest id."""
    torch.manual_seed(1)
    images = torch.randn(count, 3, config.image_size, config.image_size)
    tokens = torch.zeros(count, config.context_length, dtype=torch.int64)
    for row, length in zip(tokens, range(2, 2 + 3 * count, 3), strict=True):
        row[:length] = torch.randint(config.vocab_size - 2, (length,))
        row[0], row[length] = config.vocab_size - 2, config.vocab_size - 1
    return images, tokens


def open_clip_model(layers=2, **changes):
    sizes = open_clip.get_model_config("ViT-B-32-quickgelu") | changes
    sizes["vision_cfg"]["layers"] = sizes["text_cfg"]["layers"] = layers
    sizes["text_cfg"]["vocab_size"] = 1000
    return perturb(open_clip.model.CLIP(**sizes))


def ours_from(peer, **overrides):
    shape = dict(vision_layers=2, text_layers=2, vocab_size=1000)
    model = clip.create("ViT-B/32", **(shape | overrides)).eval()
    model.load_state_dict(peer.state_dict(), strict=True)
    return model


@pytest.fixture(scope="module", params=["quick_gelu", "gelu"])
def pair(request):
    peer = open_clip_model(quick_gelu=request.param == "quick_gelu")
    return ours_from(peer, activation=request.param), peer


@pytest.mark.parametrize("name", SIZES)
def test_state_dict_has_open_clips_names_and_shapes(name):
    with torch.device("meta"):
        peer = open_clip.model.CLIP(**open_clip.get_model_config(SIZES[name]))
        ours = clip.create(name)
    expected = {key: value.shape for key, value in peer.state_dict().items()}
    assert {key: value.shape for key, value in ours.state_dict().items()} == expected


@torch.no_grad()
def test_features_equal_open_clips(pair):
    ours, peer = pair
    images, tokens = inputs(ours.config)
    got = ours(images, tokens)
    exact = [t.double() for t in got]
    ours.double()
    peer.double()
    try:
        for got64, peer64 in zip(
            ours(images.double(), tokens), peer(images.double(), tokens), strict=True
        ):
            assert (got64 - peer64).norm() <= 1e-12 * peer64.norm()
        exact = peer(images.double(), tokens)
    finally:
        ours.float()
        peer.float()
    for name, o, p, e in zip(
        ("image", "text", "scale"), got, peer(images, tokens), exact, strict=True
    ):
        assert (o - p).norm() <= 1e-5 * p.norm()
        assert_as_accurate(name, o, p, e, floor=epsilon(torch.float32) * e.norm().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_is_as_accurate_as_open_clips(pair, dtype):
    ours, peer = pair
    images, tokens = inputs(ours.config)
    exact = [t.double() for t in peer(images, tokens)]
    with torch.autocast("cpu", dtype):
        got, theirs = ours(images, tokens), peer(images, tokens)
    for name, o, p, e in zip(("image", "text"), got, theirs, exact, strict=False):
        assert o.dtype == dtype
        assert_as_accurate(name, o, p, e, floor=epsilon(dtype) * e.norm().item())


def gradients(model, images, tokens):
    """Of a fixed linear function of everything that the model returns."""
    model.zero_grad()
    image, text, scale = model(images, tokens)
    towards = torch.randn(2, *image.shape, generator=torch.Generator().manual_seed(2))
    ((image.double() * towards[0]).sum() + (text.double() * towards[1]).sum() + scale).backward()
    return {name: p.grad.double() for name, p in model.named_parameters()}


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16-autocast"])
def test_gradients_are_as_accurate_as_open_clips(pair, autocast):
    ours, peer = pair
    images, tokens = inputs(ours.config)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got, theirs = gradients(ours, images, tokens), gradients(peer, images, tokens)
    peer.double()
    try:
        exact = gradients(peer, images.double(), tokens)
    finally:
        peer.float()
    assert got.keys() == exact.keys()
    floor = epsilon(torch.bfloat16 if autocast else torch.float32)
    for name in got:
        assert_as_accurate(
            name, got[name], theirs[name], exact[name], floor=floor * exact[name].norm().item()
        )


def from_transformers(state):
    """The state dict of a transformers CLIPModel under this library's names."""
    out = {}
    for side, prefix in (("vision", "visual."), ("text", "")):
        layers = {key.split(".")[3] for key in state if key.startswith(f"{side}_model.encoder")}
        for i in layers:
            old = f"{side}_model.encoder.layers.{i}"
            new = f"{prefix}transformer.resblocks.{i}"
            for kind in ("weight", "bias"):
                parts = [state[f"{old}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
                out[f"{new}.attn.in_proj_{kind}"] = torch.cat(parts)
                for a, b in (
                    ("self_attn.out_proj", "attn.out_proj"),
                    ("layer_norm1", "ln_1"),
                    ("layer_norm2", "ln_2"),
                    ("mlp.fc1", "mlp.c_fc"),
                    ("mlp.fc2", "mlp.c_proj"),
                ):
                    out[f"{new}.{b}.{kind}"] = state[f"{old}.{a}.{kind}"]
    for kind in ("weight", "bias"):
        out[f"visual.ln_pre.{kind}"] = state[f"vision_model.pre_layrnorm.{kind}"]
        out[f"visual.ln_post.{kind}"] = state[f"vision_model.post_layernorm.{kind}"]
        out[f"ln_final.{kind}"] = state[f"text_model.final_layer_norm.{kind}"]
    vision, text = "vision_model.embeddings", "text_model.embeddings"
    out |= {
        "visual.class_embedding": state[f"{vision}.class_embedding"],
        "visual.conv1.weight": state[f"{vision}.patch_embedding.weight"],
        "visual.positional_embedding": state[f"{vision}.position_embedding.weight"],
        "visual.proj": state["visual_projection.weight"].T,
        "token_embedding.weight": state[f"{text}.token_embedding.weight"],
        "positional_embedding": state[f"{text}.position_embedding.weight"],
        "text_projection": state["text_projection.weight"].T,
        "logit_scale": state["logit_scale"],
    }
    return out


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@torch.no_grad()
def test_features_equal_those_of_transformers(dtype, tolerance, activation):
    config = clip.ClipConfig(
        embed_dim=48,
        image_size=32,
        patch_size=8,
        vision_width=64,
        vision_layers=3,
        vision_heads=2,
        text_width=48,
        text_layers=2,
        text_heads=3,
        context_length=20,
        vocab_size=120,
        activation=activation,
    )
    shared = dict(hidden_act=activation, projection_dim=48)
    peer = perturb(
        transformers.CLIPModel(
            transformers.CLIPConfig(
                projection_dim=48,
                vision_config=dict(
                    hidden_size=64,
                    intermediate_size=256,
                    num_hidden_layers=3,
                    num_attention_heads=2,
                    image_size=32,
                    patch_size=8,
                    **shared,
                ),
                text_config=dict(
                    hidden_size=48,
                    intermediate_size=192,
                    num_hidden_layers=2,
                    num_attention_heads=3,
                    max_position_embeddings=20,
                    vocab_size=120,
                    eos_token_id=119,
                    bos_token_id=118,
                    pad_token_id=0,
                    **shared,
                ),
            )
        )
    ).to(dtype)
    ours = clip.Clip(config).to(dtype)
    ours.load_state_dict(from_transformers(peer.state_dict()), strict=True)
    images, tokens = inputs(config)
    out = peer(pixel_values=images.to(dtype), input_ids=tokens)
    image, text, scale = ours(images.to(dtype), tokens)
    for got, expected in (
        (image, out.image_embeds),
        (text, out.text_embeds),
        (scale * text @ image.T, out.logits_per_text),
    ):
        assert (got - expected).norm() <= tolerance * expected.norm()
