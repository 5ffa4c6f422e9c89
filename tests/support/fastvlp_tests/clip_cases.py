"""CLIP models of open_clip and transformers with random weights, and inputs for them."""

import open_clip
import torch
import transformers


def perturb(model):
    """No parameter keeps a value that hides a mistake, such as a bias or gain of zero."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.2, 0.8)
                module.bias.normal_(std=0.1)
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
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


def open_clip_sizes(name="ViT-B-32", layers=2, vision=None, **changes):
    """open_clip's configuration of that name, with fewer layers and tokens."""
    sizes = open_clip.get_model_config(name) | changes
    if not isinstance(sizes["vision_cfg"]["layers"], list):
        sizes["vision_cfg"]["layers"] = layers
    sizes["vision_cfg"] |= vision or {}
    sizes["text_cfg"] |= {"layers": layers, "vocab_size": 200}
    return sizes


def open_clip_model(name="ViT-B-32", kind=open_clip.model.CLIP, **changes):
    return perturb(kind(**open_clip_sizes(name, **changes)))


TINY = {
    "embed_dim": 48,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 128, "layers": 2},
    "text_cfg": {"context_length": 20, "vocab_size": 120, "width": 64, "heads": 1, "layers": 2},
}


def tiny_open_clip(kind=open_clip.model.CLIP, **changes):
    return perturb(kind(**(TINY | changes)))


def transformers_model(activation="quick_gelu", eos=119, **text):
    shared = dict(hidden_act=activation, projection_dim=48)
    vision = dict(
        hidden_size=64, intermediate_size=200, num_hidden_layers=3, num_attention_heads=2,
        image_size=32, patch_size=8,
    )  # fmt: skip
    text = dict(
        hidden_size=48, intermediate_size=192, num_hidden_layers=2, num_attention_heads=3,
        max_position_embeddings=20, vocab_size=120, eos_token_id=eos, bos_token_id=118,
        pad_token_id=0,
    ) | text  # fmt: skip
    config = transformers.CLIPConfig(
        projection_dim=48, vision_config=vision | shared, text_config=text | shared
    )
    return perturb(transformers.CLIPModel(config))
