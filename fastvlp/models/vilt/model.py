"""ViLT: one transformer over the words of a text and the patches of an image.

Kim, Son, Kim, "ViLT: Vision-and-Language Transformer Without Convolution or Region Supervision",
arXiv 2102.03334, section 3. Parameter names, shapes and initialisation are those of the original
release, heads included, so its state dicts load as they are.

A text and its image are one sequence: text tokens, image class token, patches. Sequences lie
packed, without padding (`vilt_packing`); `use_reference()` computes them padded with a key mask.
Image sizes are said explicitly, by sizes in patches or a pixel mask (`vilt_patches`).

What differs from the original on purpose:

- Without dropout the result for a sample does not depend on the batch. The original fills up with
  random patches and draws subsets in evaluation as well; here only training draws them, on the
  device, as a function of seed and sample, unless `max_image_len` asks for it.
- Dropout of an image's embedding is drawn once where several texts share the image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlp.models import base
from fastvlp.models.base import save as save
from fastvlp.models.layers.bert import BertEmbeddings, check_range
from fastvlp.models.layers.vit import VisionTransformer, init_by_width
from fastvlp.models.vilt import heads as vilt_heads
from fastvlp.models.vilt.packing import (
    ImageTokens,
    Sequences,
    first_of_each,
    join_packed,
    join_padded,
    lengths_of,
)
from fastvlp.models.vilt.patches import ImageBatch, PatchGrid, position_weights, select
from fastvlp.nn import Linear, linear
from fastvlp.ops.packing import TextLayout


@dataclass(frozen=True)
class ViltConfig:
    """Sizes of a ViLT model.

    Attributes:
        image_size: side of the square that the position embeddings cover; images may have any
            other size.
        patch_size: pixels on a side of a patch.
        width, layers, heads: of the transformer.
        vocab_size: number of tokens.
        context_length: most tokens in a text, [CLS] and [SEP] included.
        tasks: the heads that the model has, any of `fastvlp.models.vilt.heads.TASKS`.
        answers: classes of "vqa".
        token_labels: classes of "tokens".
        dropout: of embeddings, projections and feed-forward parts; attention has none.
        max_image_len: most patches of an image in training, others are left out at random; -1 for
            no limit. The original pretrains with 200 and fine-tunes without.
        init_by_width: draw the blocks' weights by `fastvlp.models.layers.vit.init_by_width`, for
            narrow models that train from scratch, rather than from N(0, 0.02²).
        eps: of the transformer's layer norms. 1e-6 in the original, 1e-12 in transformers.
        text_eps: of the layer norms of the text embedding and the masked language modelling head.
    """

    image_size: int = 384
    patch_size: int = 32
    width: int = 768
    layers: int = 12
    heads: int = 12
    vocab_size: int = 30522
    context_length: int = 40
    tasks: tuple[str, ...] = ("mlm", "itm")
    answers: int = 3129
    token_labels: int = 2
    dropout: float = 0.1
    max_image_len: int = 200
    init_by_width: bool = False
    eps: float = 1e-6
    text_eps: float = 1e-12

    def __post_init__(self) -> None:
        unknown = set(self.tasks) - set(vilt_heads.TASKS)
        if unknown:
            raise ValueError(f"tasks: expected some of {vilt_heads.TASKS}, got {sorted(unknown)}")
        if self.max_image_len < 1 and self.max_image_len != -1:
            raise ValueError(f"max_image_len: expected at least 1, or -1, got {self.max_image_len}")

    @property
    def modalities(self) -> int:
        """Rows of the modality embedding: text, image, and with NLVR2 the second image."""
        return 3 if "nlvr2" in self.tasks else 2


CONFIGS: dict[str, ViltConfig] = {
    "tiny": ViltConfig(image_size=64, patch_size=8, width=192, layers=6, heads=3),
    "mini": ViltConfig(
        image_size=64, patch_size=8, width=192, layers=4, heads=3, dropout=0.0, init_by_width=True
    ),
    "small": ViltConfig(width=384, heads=6),
    "base-p32-384": ViltConfig(),
}


class Vilt(vilt_heads.Objectives, base.Model):
    """The single stream and its heads; objectives are methods of `vilt_heads.Objectives`."""

    kind = "vilt"
    config_type = ViltConfig

    def __init__(self, config: ViltConfig) -> None:
        super().__init__(config)
        width, dropout = config.width, config.dropout
        self.text_embeddings = BertEmbeddings(
            config.vocab_size, width, positions=config.context_length, dropout=dropout
        )
        self.token_type_embeddings = nn.Embedding(config.modalities, width)
        # Its parts are used, its forward is not: the tokens are those of texts as well.
        self.transformer = VisionTransformer(
            config.image_size, config.patch_size, width, config.layers, config.heads, dropout
        )
        self.pooler = nn.ModuleDict({"dense": Linear(width, width)})
        if config.init_by_width:
            init_by_width(self.transformer.blocks)
        vilt_heads.initialise(self.token_type_embeddings)
        vilt_heads.initialise(self.pooler)
        with torch.no_grad():
            self.token_type_embeddings.weight[2:] = self.token_type_embeddings.weight[1]
        vilt_heads.add(self, config)
        for name, module in self.named_modules():
            if isinstance(module, nn.LayerNorm) and not name.endswith("classifier.1"):
                module.eps = config.eps if name.startswith("transformer.") else config.text_eps

    def forward(
        self,
        tokens: Tensor,
        images: Tensor | ImageBatch,
        text: Sequence[int] | Tensor | None = None,
        *,
        image_type: int = 1,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Features of pairs of one text and one image each; see `encode`.

        Returns:
            [n, length, width] of the text tokens and [n, most image tokens, width] of the image's,
            class token first, zeros at padding; and the pooled [n, width].
        """
        sequences = self.encode(tokens, self.embed_images(images), text, image_type=image_type)
        normed = sequences.map(self.transformer.norm)
        return normed.text(), normed.image(), self.pool(sequences)

    def embed_images(
        self,
        batch: Tensor | ImageBatch,
        *,
        max_image_len: int | None = None,
        seed: int | None = None,
    ) -> ImageTokens:
        """Class token and patches of images with their positions.

        Args:
            batch: images that fill their canvas [n, 3, H, W], or `ImageBatch`, where sizes in a
                list or on the CPU let nothing wait for a GPU.
            max_image_len: images with more patches keep a random subset of this many; None for the
                configuration's limit in training and none in evaluation, -1 for none.
            seed: the subsets are a function of it and of `batch.sample_index`; None draws one from
                torch's generator.

        Raises:
            TypeError, ValueError: an argument is not as described; the message names it.
        """
        batch = batch if isinstance(batch, ImageBatch) else ImageBatch(batch)
        if max_image_len is None:
            max_image_len = self.config.max_image_len if self.training else -1
        grid = PatchGrid.make(batch, self.config.patch_size)
        selection = select(grid, max_image_len, seed, batch.sample_index)
        counts = tuple(count + 1 for count in selection.counts)
        # What the model does not see is zero or absent, so that a NaN there reaches no gradient.
        if self.reference:
            image, place, kept = selection.padded()
            patches = self._embed_patches(batch.images, grid, image, place, kept[..., None])
            first = self._class_token(patches).expand(len(counts), 1, -1)
            return ImageTokens(self.transformer.pos_drop(torch.cat([first, patches], 1)), counts)
        patches = self._embed_patches(batch.images, grid, *selection.packed())
        first = self._class_token(patches).expand(len(counts), -1)
        rows = first_of_each(first, patches, selection.counts)
        return ImageTokens(self.transformer.pos_drop(rows), counts)

    def encode(
        self,
        tokens: Tensor,
        images: ImageTokens,
        text: Sequence[int] | Tensor | None = None,
        *,
        image_index: Sequence[int] | Tensor | None = None,
        image_type: int = 1,
    ) -> Sequences:
        """The transformer without its last norm, on texts and the images that go with them.

        Args:
            tokens: [n, length] token ids, [CLS] first, padded at the end.
            images: from `embed_images`.
            text: [n] lengths, or a mask [n, length], of the texts; None for no padding. From lists
                and the CPU nothing waits for a GPU.
            image_index: [n], each text's image; None for one image each in the same order.
            image_type: row of the modality embedding; 2 for the second image of NLVR2.

        Raises:
            TypeError, ValueError: an argument is not as described; the message names it.
        """
        lengths = self._check_text(tokens, text)
        index = self._check_index(image_index, len(tokens), len(images.lengths))
        if not 1 <= image_type < self.config.modalities:
            raise ValueError(
                f"image_type: expected 1 to {self.config.modalities - 1}, got {image_type}"
            )
        kinds = self.token_type_embeddings.weight
        patches = ImageTokens(images.rows + kinds[image_type].to(images.rows.dtype), images.lengths)
        if self.reference:
            words = (self.text_embeddings(tokens) + kinds[0]).to(patches.rows.dtype)
            sequences = join_padded(words, lengths, patches, index)
        else:
            layout = TextLayout.from_lengths(lengths, tokens.shape[1], tokens.device)
            at = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
            words = self.text_embeddings(layout.pack(tokens), layout.pack(at)) + kinds[0]
            words = words.to(patches.rows.dtype)
            sequences = join_packed(words, lengths, tokens.shape[1], patches, index)
        return sequences.map(lambda x: self._blocks(x, sequences))

    def pool(self, sequences: Sequences) -> Tensor:
        """[n, width], what the heads for whole pairs take: of the first token of the text."""
        return torch.tanh(self.pooler["dense"](self.transformer.norm(sequences.first())))

    def _blocks(self, x: Tensor, sequences: Sequences) -> Tensor:
        for block in self.transformer.blocks:
            x = block(x, key_mask=sequences.key_mask, segments=sequences.segments)
        return x

    def _embed_patches(
        self,
        images: Tensor,
        grid: PatchGrid,
        image: Tensor,
        place: Tensor,
        kept: Tensor | bool = True,
    ) -> Tensor:
        """The patches at [..] image and place in the canvas to [.., width]; no other is read."""
        size, projection = self.config.patch_size, self.transformer.patch_embed.proj
        columns = grid.valid.shape[2]
        patches = images.unflatten(3, (-1, size)).unflatten(2, (-1, size)).permute(0, 2, 4, 1, 3, 5)
        patches = patches[image, place // columns, place % columns].flatten(-3)
        if kept is not True:
            patches = patches.masked_fill(~kept, 0)
        patches = patches.to(projection.weight.dtype)
        project = F.linear if self.reference else linear
        patches = project(patches, projection.weight.flatten(1), projection.bias)
        return (patches + self._positions(grid, image, place, patches)) * kept

    def _positions(self, grid: PatchGrid, image: Tensor, place: Tensor, like: Tensor) -> Tensor:
        positions = self.transformer.pos_embed[0, 1:]
        dtype = torch.float64 if positions.dtype == torch.float64 else torch.float32
        side = self.config.image_size // self.config.patch_size
        # A matmul with the few positions: its gradient needs no atomic additions.
        with vilt_heads.without_autocast(like.device):
            weights = position_weights(grid, image, place, side, dtype)
            return (weights @ positions.to(dtype)).to(like.dtype)

    def _class_token(self, like: Tensor) -> Tensor:
        return (self.transformer.cls_token + self.transformer.pos_embed[:, :1])[0].to(like.dtype)

    def _check_text(self, tokens: Tensor, text) -> tuple[int, ...]:
        if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int32, torch.int64):
            found = getattr(tokens, "dtype", type(tokens).__name__)
            raise TypeError(f"tokens: expected int32 or int64, got {found}")
        longest = self.config.context_length
        if tokens.dim() != 2 or not 1 <= tokens.shape[1] <= longest:
            raise ValueError(
                f"tokens: expected [n, length] with length 1 to {longest}, got {list(tokens.shape)}"
            )
        check_range("tokens", tokens, self.config.vocab_size)
        return lengths_of(tokens, text)

    @staticmethod
    def _check_index(index, texts: int, images: int) -> Tensor:
        if index is None:
            if texts != images:
                raise ValueError(
                    f"image_index: expected one for each text where there are {texts} texts "
                    f"and {images} images"
                )
            return torch.arange(texts)
        index = torch.as_tensor(index).cpu().long()
        if index.shape != (texts,) or (texts and not 0 <= index.min() <= index.max() < images):
            raise ValueError(
                f"image_index: expected {texts} numbers from 0 to {images - 1}, "
                f"got {index.tolist()}"
            )
        return index


def create(name: str, **overrides: Any) -> Vilt:
    """A freshly initialised model of a named size, a key of ``CONFIGS``.

    Args:
        overrides: fields of ``ViltConfig`` to change, such as ``tasks=("vqa",)``.

    Raises:
        ValueError: no such size, or the sizes do not fit together.
        TypeError: no such field.
    """
    if name not in CONFIGS:
        raise base.unknown_name("name", name, list(CONFIGS))
    return Vilt(dataclasses.replace(CONFIGS[name], **overrides))


def load(path: str | Path) -> Vilt:
    """The model that ``save(model, path)`` wrote, on the CPU, in evaluation mode."""
    return base.load(path, "vilt")
