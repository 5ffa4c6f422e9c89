"""Sizes of ALBEF's models."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class AlbefConfig:
    """Sizes and settings of an ALBEF model.

    Attributes:
        image_size, patch_size: pixels on a side; the patch divides the image.
        vision_width, vision_layers, vision_heads: the image transformer.
        text_width, text_heads: the text layers and the fusion layers.
        text_layers, fusion_layers: how many of each; fusion comes after text.
        vocab_size, text_positions: tokens, and the longest text.
        embed_dim: width of the contrastive features.
        dropout, attention_dropout: of text and fusion; the image transformer has none.
        init_by_width: draw the layers' weights from N(0, 1 / inputs) rather than BERT's and timm's
            N(0, 0.02²), which suits widths of about 768 and pretrained weights. Narrow models that
            train from scratch hardly tell two texts apart with 0.02.
        temperature: the contrastive temperature to start from; it is learned.
        pretraining: keep the momentum encoder and the queues. Without them the model encodes, fuses
            and classifies, which is what fine-tuning and evaluation want.
        queue_size: pairs in the queues.
        queue_ids: the queues keep the pairs' ids, and pairs of equal id are positives.
        momentum: of the momentum encoder, for each update.
        momentum_copy: "bfloat16" or "float16": the teacher computes with a copy of the momentum
            encoder in this dtype; None: with the momentum encoder itself.
        teacher_dropout: the teacher computes with dropout while the model is in training mode, as
            the authors' does; False turns it off.
    """

    image_size: int = 256
    patch_size: int = 16
    vision_width: int = 768
    vision_layers: int = 12
    vision_heads: int = 12
    text_width: int = 768
    text_heads: int = 12
    text_layers: int = 6
    fusion_layers: int = 6
    vocab_size: int = 30522
    text_positions: int = 512
    embed_dim: int = 256
    dropout: float = 0.1
    attention_dropout: float = 0.1
    init_by_width: bool = False
    temperature: float = 0.07
    pretraining: bool = True
    queue_size: int = 65536
    queue_ids: bool = False
    momentum: float = 0.995
    momentum_copy: str | None = None
    teacher_dropout: bool = True

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, int) and not isinstance(field.default, bool):
                if type(value) is not int or value < 1:
                    raise ValueError(
                        f"{field.name}: expected a whole number above 0, got {value!r}"
                    )
            elif isinstance(field.default, float) and not 0 <= value <= 1:
                raise ValueError(f"{field.name}: expected 0 to 1, got {value!r}")
        if self.momentum_copy not in (None, "bfloat16", "float16"):
            raise ValueError(
                f"momentum_copy: expected None, 'bfloat16' or 'float16', got {self.momentum_copy!r}"
            )


CONFIGS: dict[str, AlbefConfig] = {
    "base": AlbefConfig(),
    "base-384": AlbefConfig(image_size=384),
    "small": AlbefConfig(vision_width=384, vision_heads=6, text_width=384, text_heads=6),
    "mini": AlbefConfig(
        image_size=64, patch_size=8, vision_width=192, vision_layers=6, vision_heads=3,
        text_width=192, text_heads=3, text_layers=2, fusion_layers=2, vocab_size=4096,
        text_positions=25, embed_dim=128, dropout=0.0, attention_dropout=0.0, init_by_width=True,
        queue_size=1024, momentum=0.99,
    ),
    "tiny": AlbefConfig(
        image_size=64, vision_width=64, vision_layers=2, vision_heads=2, text_width=64,
        text_heads=2, text_layers=2, fusion_layers=2, vocab_size=512, text_positions=64,
        embed_dim=32, queue_size=64,
    ),
}  # fmt: skip
