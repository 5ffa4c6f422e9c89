"""ALBEF's encoders: the part that the momentum encoder repeats.

Parameter names are those of the authors' checkpoints.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlp.models.albef.config import AlbefConfig
from fastvlp.models.layers.bert import BertEmbeddings, MlmHead
from fastvlp.models.layers.vit import VisionTransformer, init_by_width
from fastvlp.nn import FusionLayer
from fastvlp.ops.packing import PairLayout, TextLayout


class TextEncoder(nn.Module):
    """BERT whose last layers also attend to an image, and its masked language modelling head."""

    def __init__(self, config: AlbefConfig) -> None:
        super().__init__()
        width, self.text_layers = config.text_width, config.text_layers
        layers = nn.ModuleList(
            FusionLayer(
                width,
                config.text_heads,
                image_width=config.vision_width,
                cross=i >= config.text_layers,
                dropout=config.dropout,
                attention_dropout=config.attention_dropout,
            )
            for i in range(config.text_layers + config.fusion_layers)
        )
        self.bert = nn.ModuleDict(
            {
                "embeddings": BertEmbeddings(
                    config.vocab_size, width, config.text_positions, dropout=config.dropout
                ),
                "encoder": nn.ModuleDict({"layer": layers}),
            }
        )
        self.cls = nn.ModuleDict({"predictions": MlmHead(width, config.vocab_size)})
        # One matrix, as in BERT and in the authors' model.
        self.predictions.decoder.weight = self.embeddings.word_embeddings.weight

    @property
    def embeddings(self) -> BertEmbeddings:
        return self.bert["embeddings"]

    @property
    def predictions(self) -> MlmHead:
        return self.cls["predictions"]

    @property
    def text(self) -> list[FusionLayer]:
        """The layers that attend to text alone."""
        return list(self.bert["encoder"]["layer"])[: self.text_layers]

    @property
    def fusion(self) -> list[FusionLayer]:
        """The layers that attend to the image as well."""
        return list(self.bert["encoder"]["layer"])[self.text_layers :]


class Towers(nn.Module):
    """Images and texts to tokens, tokens to contrastive features, and both to fused tokens.

    Text runs packed (`encode_text`, `fuse`) or padded (`encode_padded`, `fuse_padded`); up to
    rounding the results at tokens are the same.
    """

    def __init__(self, config: AlbefConfig) -> None:
        super().__init__()
        self.visual_encoder = VisionTransformer(
            config.image_size,
            config.patch_size,
            config.vision_width,
            config.vision_layers,
            config.vision_heads,
        )
        self.text_encoder = TextEncoder(config)
        self.vision_proj = nn.Linear(config.vision_width, config.embed_dim)
        self.text_proj = nn.Linear(config.text_width, config.embed_dim)
        if config.init_by_width:
            for layers in (self.visual_encoder.blocks, self.text_encoder.bert["encoder"]):
                init_by_width(layers)

    def encode_image(self, images: Tensor) -> Tensor:
        """[n, 3, image_size, image_size] → [n, 1 + patches, vision_width]"""
        return self.visual_encoder(images)

    def encode_text(self, ids: Tensor, layout: TextLayout) -> Tensor:
        """Padded token ids [n, length] → [tokens, text_width] packed, before fusion."""
        encoder = self.text_encoder
        positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        x = encoder.embeddings(layout.pack(ids), layout.pack(positions))
        for layer in encoder.text:
            x = layer(x, layout.cu_seqlens, max_seqlen_pairs=layout.max_seqlen)
        return x

    def fuse(
        self, x: Tensor, pairs: PairLayout, images: Tensor, rows: Tensor | None = None
    ) -> Tensor:
        """Packed tokens grouped by image, and image tokens [n, L, vision_width], to fused ones.

        rows: which of them are wanted (int64 on the host), in this order; None for all. The last
            layer computes no others.
        """
        layers = self.text_encoder.fusion
        keep = None if rows is None else pairs.keep(rows)
        for layer in layers:
            x = layer(
                x,
                pairs.cu_seqlens_pairs,
                images,
                pairs.cu_seqlens_images,
                max_seqlen_pairs=pairs.max_seqlen_pairs,
                max_seqlen_images=pairs.max_seqlen_images,
                keep=keep if layer is layers[-1] else None,
            )
        return x if keep is None else keep.restore(x)

    def encode_padded(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Token ids [n, length] and their mask → [n, length, text_width], before fusion."""
        x = self.text_encoder.embeddings(ids)
        for layer in self.text_encoder.text:
            x = layer.padded(x, mask)
        return x

    def fuse_padded(self, x: Tensor, mask: Tensor, images: Tensor) -> Tensor:
        """[pairs, length, text_width] and each pair's image tokens → fused tokens."""
        for layer in self.text_encoder.fusion:
            x = layer.padded(x, mask, images)
        return x

    def image_features(self, tokens: Tensor) -> Tensor:
        """Image tokens [n, L, vision_width] → unit rows [n, embed_dim], at least float32."""
        return _unit_rows(self.vision_proj(tokens[:, 0]))

    def text_features(self, first: Tensor) -> Tensor:
        """Each text's first token before fusion, [n, text_width] → unit rows [n, embed_dim]."""
        return _unit_rows(self.text_proj(first))


def _unit_rows(features: Tensor) -> Tensor:
    # Not in half precision, where the norm's rounding would be common to all products of a row.
    wide = features if features.dtype == torch.float64 else features.float()
    return F.normalize(wide, dim=-1)
