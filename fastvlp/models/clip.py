"""CLIP: a vision transformer and a causal text transformer that share an embedding space.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021
(sections 2.3 to 2.5). Parameter names, shapes and initialisation are those of OpenAI's release, so
its state dicts load with ``strict=True``.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlp.models import base
from fastvlp.models.base import save as save
from fastvlp.models.layers import ACTIVATIONS, Transformer
from fastvlp.nn import LayerNorm

INITIAL_LOGIT_SCALE = math.log(1 / 0.07)
MAX_LOGIT_SCALE = math.log(100)


@dataclass(frozen=True)
class ClipConfig:
    """Sizes of a CLIP model.

    Attributes:
        embed_dim: width of the shared embedding space.
        image_size: pixels on a side.
        patch_size: pixels on a side of a patch; divides ``image_size``.
        vision_width, vision_layers, vision_heads: the image transformer.
        text_width, text_layers, text_heads: the text transformer.
        context_length: most tokens in a text, start and end tokens included.
        vocab_size: number of tokens. The end-of-text token must have the largest id in use.
        activation: "quick_gelu" for OpenAI's weights and what descends from them, else "gelu".
            Weights run with the other one lose accuracy without any other sign.
    """

    embed_dim: int
    image_size: int
    patch_size: int
    vision_width: int
    vision_layers: int
    vision_heads: int
    text_width: int
    text_layers: int
    text_heads: int
    context_length: int = 77
    vocab_size: int = 49408
    activation: str = "quick_gelu"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "activation" and (type(value) is not int or value < 1):
                raise ValueError(f"{field.name} must be a positive integer, got {value!r}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {sorted(ACTIVATIONS)}, got {self.activation!r}"
            )
        for whole, part in (
            ("image_size", "patch_size"),
            ("vision_width", "vision_heads"),
            ("text_width", "text_heads"),
        ):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"{part} must divide {whole}, got "
                    f"{part}={getattr(self, part)} and {whole}={getattr(self, whole)}"
                )


CONFIGS: dict[str, ClipConfig] = {
    "tiny": ClipConfig(512, 64, 8, 192, 6, 3, 192, 4, 3, activation="gelu"),
    "ViT-B/32": ClipConfig(512, 224, 32, 768, 12, 12, 512, 12, 8),
    "ViT-B/16": ClipConfig(512, 224, 16, 768, 12, 12, 512, 12, 8),
    "ViT-L/14": ClipConfig(768, 224, 14, 1024, 24, 16, 768, 12, 12),
    "ViT-L/14@336px": ClipConfig(768, 336, 14, 1024, 24, 16, 768, 12, 12),
}


class VisionTransformer(nn.Module):
    """Images [n, 3, size, size] → features [n, embed_dim], not normalised."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        width, patch = config.vision_width, config.patch_size
        scale = width**-0.5
        positions = (config.image_size // patch) ** 2 + 1
        self.image_size = config.image_size
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(positions, width))
        self.ln_pre = LayerNorm(width)
        self.transformer = Transformer(
            width, config.vision_layers, config.vision_heads, 4 * width, config.activation
        )
        self.ln_post = LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, config.embed_dim))

    def forward(self, images: Tensor) -> Tensor:
        self._check(images)
        patches = self._patches(images.to(self.conv1.weight.dtype))
        positions = self.positional_embedding.to(patches.dtype)
        class_token = self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        x = torch.cat([class_token, patches], dim=1) + positions
        x = self.transformer(self.ln_pre(x))
        return self.ln_post(x[:, 0]) @ self.proj

    def _patches(self, images: Tensor) -> Tensor:
        # A convolution whose stride is its size is one matrix product, and the product is faster.
        size = self.conv1.kernel_size[0]
        patches = images.unflatten(3, (-1, size)).unflatten(2, (-1, size))
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return F.linear(patches, self.conv1.weight.flatten(1))

    def _check(self, images: Tensor) -> None:
        if not images.is_floating_point():
            raise TypeError(
                f"images must be floating point (normalised pixels), got {images.dtype}"
            )
        expected = (3, self.image_size, self.image_size)
        if images.ndim != 4 or images.shape[1:] != expected:
            raise ValueError(
                f"images must be [n, 3, {self.image_size}, {self.image_size}], "
                f"got {list(images.shape)}; resize and crop them first"
            )


class Clip(base.Model):
    """CLIP's two towers and its temperature.

    The text tower's parameters lie at the top level, as in the published checkpoints.
    """

    kind = "clip"

    def __init__(self, config: ClipConfig) -> None:
        super().__init__(config)
        width = config.text_width
        self.visual = VisionTransformer(config)
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, width))
        self.transformer = Transformer(
            width, config.text_layers, config.text_heads, 4 * width, config.activation
        )
        self.ln_final = LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, config.embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(INITIAL_LOGIT_SCALE))
        self._init_text()

    def _init_text(self) -> None:
        width, layers = self.config.text_width, self.config.text_layers
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=width**-0.5)
        for block in self.transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=(2 * layers * width) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=(2 * layers * width) ** -0.5)

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised features of both sides and the factor for their products.

        Args:
            images: [n, 3, image_size, image_size] floating point.
            tokens: [m, length] integer, length at most ``context_length``.

        Returns:
            image features [n, embed_dim] and text features [m, embed_dim], rows of norm 1, and
            exp(logit_scale), a scalar: the arguments of ``fastvlp.losses.ClipLoss``.

        Raises:
            TypeError, ValueError: an argument has the wrong dtype, shape or range.
        """
        return (
            _unit_rows(self.encode_image(images)),
            _unit_rows(self.encode_text(tokens)),
            self.logit_scale.exp(),
        )

    def encode_image(self, images: Tensor) -> Tensor:
        """[n, 3, image_size, image_size] → [n, embed_dim], not normalised."""
        return self.visual(images)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """[m, length] → [m, embed_dim], not normalised, read at each row's largest token id.

        The padding after the last end-of-text token of the batch is dropped, which under the
        causal mask changes nothing but the time. Finding it waits for the device once.
        """
        tokens = self._trim(tokens)
        ends = tokens.argmax(dim=-1)
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        if torch.is_autocast_enabled(x.device.type):
            # Autocast leaves embeddings alone; the residual stream is to be in its dtype.
            x = x.to(torch.get_autocast_dtype(x.device.type))
        x = self.transformer(x, causal=True)
        # Only one token of each text is used and the norm is per token.
        x = self.ln_final(x[torch.arange(len(x), device=x.device), ends])
        return x @ self.text_projection

    def _trim(self, tokens: Tensor) -> Tensor:
        if tokens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"tokens must be int32 or int64, got {tokens.dtype}")
        if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= self.config.context_length:
            raise ValueError(
                f"tokens must be [m, length] with length from 1 to "
                f"{self.config.context_length}, got {list(tokens.shape)}"
            )
        # A graph captured by the compiler must not depend on the values.
        if torch.compiler.is_compiling() or not len(tokens):
            return tokens
        smallest, largest = tokens.aminmax()
        end = tokens.argmax(dim=-1).max()
        smallest, largest, end = torch.stack([smallest, largest, end.to(smallest)]).tolist()
        if smallest < 0 or largest >= self.config.vocab_size:
            raise ValueError(
                f"tokens must lie in 0 .. {self.config.vocab_size - 1}, "
                f"got ids from {smallest} to {largest}"
            )
        return tokens[:, : end + 1]

    @torch.no_grad()
    def clamp_logit_scale_(self) -> None:
        """Bring logit_scale back into [0, ln 100]; call it after each optimiser step."""
        self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)


def _unit_rows(features: Tensor) -> Tensor:
    # A norm rounded to half precision would be a common error of all the products of its row.
    wide = features if features.dtype == torch.float64 else features.float()
    return F.normalize(wide, dim=-1).to(features.dtype)


def create(name: str, **overrides: int | str) -> Clip:
    """A freshly initialised model of a named size.

    Args:
        name: a key of ``CONFIGS``.
        overrides: fields of ``ClipConfig`` to change, such as ``vocab_size=1200``.

    Raises:
        ValueError: no such size, or the sizes do not fit together.
        TypeError: no such field.
    """
    if name not in CONFIGS:
        raise ValueError(f"name must be one of {sorted(CONFIGS)}, got {name!r}")
    return Clip(dataclasses.replace(CONFIGS[name], **overrides))


def load(path: str | Path) -> Clip:
    """The model that ``save(model, path)`` wrote, on the CPU, in evaluation mode.

    Raises:
        FileNotFoundError: one of the two files is not there.
    """
    return base.load(path, "clip")
