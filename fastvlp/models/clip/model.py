"""CLIP: an image tower and a causal text transformer that share an embedding space.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021
(sections 2.3 to 2.5). Parameter names, shapes and initialisation are those of OpenAI's release, so
its state dicts load with ``strict=True``; `fastvlp.models.checkpoints.load_clip` reads its files
and those of open_clip and transformers.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlp.models import base
from fastvlp.models.base import ReferenceMixin
from fastvlp.models.base import save as save
from fastvlp.models.clip.config import ClipConfig, config_of_name
from fastvlp.models.clip.resnet import ModifiedResNet
from fastvlp.models.clip.transformer import Transformer
from fastvlp.models.layers.vit import Segments
from fastvlp.nn import LayerNorm, linear
from fastvlp.ops.autocast import as_autocast
from fastvlp.ops.packing import TextLayout

INITIAL_LOGIT_SCALE = math.log(1 / 0.07)
MAX_LOGIT_SCALE = math.log(100)


def _first(x: Tensor) -> Tensor:
    return x[:, :1]


class VisionTransformer(ReferenceMixin):
    """Images [n, 3, size, size] → features [n, embed_dim], not normalised."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        width, patch = config.vision_width, config.patch_size
        scale = width**-0.5
        positions = (config.image_size // patch) ** 2 + 1
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(positions, width))
        self.ln_pre = LayerNorm(width)
        self.transformer = Transformer(
            width,
            config.vision_layers,
            config.vision_heads,
            config.vision_hidden or 4 * width,
            config.activation,
        )
        self.ln_post = LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, config.embed_dim))

    def forward(self, images: Tensor) -> Tensor:
        patches = self._patches(images.to(self.conv1.weight.dtype))
        positions = self.positional_embedding.to(patches.dtype)
        class_token = self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        x = torch.cat([class_token, patches], dim=1) + positions
        if self.reference:
            x = self.transformer(self.ln_pre(x))
        else:
            x = self.transformer(self.ln_pre(x), pick=_first)
        return self.ln_post(x[:, 0]) @ self.proj

    def _patches(self, images: Tensor) -> Tensor:
        """[n, 3, size, size] → [n, patches, width]"""
        if self.reference:
            return self.conv1(images).flatten(2).transpose(1, 2)
        # A convolution whose stride is its size is one matmul, and the matmul is faster.
        size = self.conv1.kernel_size[0]
        patches = images.unflatten(3, (-1, size)).unflatten(2, (-1, size))
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return linear(patches, self.conv1.weight.flatten(1))


class Clip(base.Model):
    """CLIP's two towers and its temperature.

    The text tower's parameters lie at the top level, as in the published checkpoints.
    """

    kind = "clip"
    config_type = ClipConfig

    def __init__(self, config: ClipConfig) -> None:
        super().__init__(config)
        width = config.text_width
        self.visual = (ModifiedResNet if config.is_resnet else VisionTransformer)(config)
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, width))
        self.transformer = Transformer(
            width,
            config.text_layers,
            config.text_heads,
            config.text_hidden or 4 * width,
            config.activation,
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
        self._check_images(images)
        return self.visual(images)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """[m, length] → [m, embed_dim], not normalised, read at each row's end-of-text token.

        What follows the end of a text changes nothing under the causal mask. The texts are packed
        without it, for which their lengths are read back once; under the compiler and with
        `use_reference` they stay padded.
        """
        self._check_tokens(tokens)
        ends = self._ends(tokens)
        # A graph captured by the compiler must not depend on the values.
        if torch.compiler.is_compiling() or not len(tokens):
            return self._encode_padded(tokens, ends)
        lengths = self._lengths(tokens, ends)
        if self.reference:
            return self._encode_padded(tokens, ends)
        return self._encode_packed(tokens, lengths)

    def _encode_padded(self, tokens: Tensor, ends: Tensor) -> Tensor:
        x = self._embed(tokens, torch.arange(tokens.shape[1], device=tokens.device))
        x = self.transformer(x, causal=True)
        return self._project(x[torch.arange(len(x), device=x.device), ends])

    def _encode_packed(self, tokens: Tensor, lengths: list[int]) -> Tensor:
        layout = TextLayout.from_lengths(lengths, tokens.shape[1], tokens.device)
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
        x = self._embed(layout.pack(tokens), layout.pack(positions))
        segments = Segments(layout.cu_seqlens, layout.max_seqlen)
        x = self.transformer(x, causal=True, segments=segments, pick=layout.last)
        return self._project(x)

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """[.., length] → [.., length, text_width]"""
        x = self.token_embedding(tokens) + F.embedding(positions, self.positional_embedding)
        # Autocast leaves embeddings alone; the residual stream is to be in its dtype.
        return as_autocast(x)[0]

    def _project(self, x: Tensor) -> Tensor:
        """The transformer's output at the ends, [m, text_width] → [m, embed_dim]"""
        # Only one token of each text is used and the norm is per token.
        return self.ln_final(x) @ self.text_projection

    def _ends(self, tokens: Tensor) -> Tensor:
        """[m, length] → [m], the place of each end-of-text token."""
        end = self.config.end_token
        return (tokens if end is None else (tokens == end).int()).argmax(dim=-1)

    def _lengths(self, tokens: Tensor, ends: Tensor) -> list[int]:
        """Of the texts with their ends, on the host; the ids are checked on the way there."""
        end = self.config.end_token
        found = ends >= 0 if end is None else (tokens == end).any(dim=-1)
        values = torch.cat([*(x[None] for x in tokens.aminmax()), found.all()[None], ends])
        smallest, largest, found, *ends = values.tolist()
        if smallest < 0 or largest >= self.config.vocab_size:
            raise ValueError(
                f"tokens must lie in 0 .. {self.config.vocab_size - 1}, "
                f"got ids from {smallest} to {largest}"
            )
        if not found:
            raise ValueError(f"tokens must hold the end token {end} in each row")
        return [place + 1 for place in ends]

    def _check_images(self, images: Tensor) -> None:
        if not images.is_floating_point():
            raise TypeError(
                f"images must be floating point (normalised pixels), got {images.dtype}"
            )
        size = self.config.image_size
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(
                f"images must be [n, 3, {size}, {size}], "
                f"got {list(images.shape)}; resize and crop them first"
            )

    def _check_tokens(self, tokens: Tensor) -> None:
        if tokens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"tokens must be int32 or int64, got {tokens.dtype}")
        if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= self.config.context_length:
            raise ValueError(
                f"tokens must be [m, length] with length from 1 to "
                f"{self.config.context_length}, got {list(tokens.shape)}"
            )

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
        name: a key of ``CONFIGS``, or open_clip's spelling of one; see ``config_of_name``.
        overrides: fields of ``ClipConfig`` to change, such as ``vocab_size=1200``.

    Raises:
        ValueError: no such size, or the sizes do not fit together.
        TypeError: no such field.

    Examples:
        >>> create("tiny", vocab_size=1200).config.image_size
        64
    """
    return Clip(dataclasses.replace(config_of_name(name), **overrides))


def load(path: str | Path) -> Clip:
    """The model that ``save(model, path)`` wrote, on the CPU, in evaluation mode.

    Raises:
        FileNotFoundError: one of the two files is not there.
    """
    return base.load(path, "clip")
