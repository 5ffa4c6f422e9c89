"""Sizes of CLIP models, and the names of published ones."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from fastvlp.models.base import unknown_name
from fastvlp.models.clip.transformer import ACTIVATIONS

# After a name: with the activation of OpenAI's weights.
QUICK = "-quickgelu"


@dataclass(frozen=True)
class ClipConfig:
    """Sizes of a CLIP model.

    Attributes:
        embed_dim: width of the shared embedding space.
        image_size: pixels on a side.
        patch_size: pixels on a side of a patch, or of what one position of a ResNet's last feature
            map stands for, 32; divides ``image_size``.
        vision_width, vision_layers, vision_heads: the image transformer. Four numbers of layers
            make a ResNet: blocks of each stage; the width is then that of the first stage, and the
            heads are those of the attention that pools the last feature map, of 32 times the width.
        text_width, text_layers, text_heads: the text transformer.
        context_length: most tokens in a text, start and end tokens included.
        vocab_size: number of tokens.
        activation: "quick_gelu" for OpenAI's weights and what descends from them, else "gelu".
            Weights run with the other one lose accuracy without any other sign.
        vision_hidden, text_hidden: width inside the transformers' feed-forward parts, None for
            four times that of the transformer.
        end_token: id of the end-of-text token, of which the first counts; None for the largest id
            of each text, which is the same where no id is above it.
    """

    embed_dim: int
    image_size: int
    patch_size: int
    vision_width: int
    vision_layers: int | tuple[int, int, int, int]
    vision_heads: int
    text_width: int
    text_layers: int
    text_heads: int
    context_length: int = 77
    vocab_size: int = 49408
    activation: str = "quick_gelu"
    vision_hidden: int | None = None
    text_hidden: int | None = None
    end_token: int | None = None

    def __post_init__(self) -> None:
        self._check_values()
        resnet = self.is_resnet
        if resnet and (self.patch_size, self.vision_hidden) != (32, None):
            raise ValueError(
                "patch_size and vision_hidden must be 32 and None for a ResNet (vision_layers of "
                f"four), got {self.patch_size} and {self.vision_hidden}"
            )
        for name, whole, part in (
            ("image_size", self.image_size, "patch_size"),
            ("vision_width", self.vision_width * (32 if resnet else 1), "vision_heads"),
            ("text_width", self.text_width, "text_heads"),
        ):
            if whole % getattr(self, part):
                raise ValueError(
                    f"{part} must divide {'32 times the ' if whole != getattr(self, name) else ''}"
                    f"{name}, got {part}={getattr(self, part)} and {name}={getattr(self, name)}"
                )

    def _check_values(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "activation" or (value is None and field.default is None):
                continue
            least = 0 if field.name == "end_token" else 1
            stages = value if field.name == "vision_layers" and self.is_resnet else (value,)
            if any(type(stage) is not int or stage < least for stage in stages):
                raise ValueError(f"{field.name} must be a positive integer, got {value!r}")
        if self.is_resnet and len(self.vision_layers) != 4:
            raise ValueError(
                f"vision_layers must be a number, or four for a ResNet, got {self.vision_layers}"
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {sorted(ACTIVATIONS)}, got {self.activation!r}"
            )

    @property
    def is_resnet(self) -> bool:
        """Whether the image tower is a ResNet."""
        return isinstance(self.vision_layers, tuple)


def _open_clip(*sizes: int, **others: int) -> ClipConfig:
    return ClipConfig(*sizes, activation="gelu", **others)


CONFIGS: dict[str, ClipConfig] = {
    "tiny": _open_clip(512, 64, 8, 192, 6, 3, 192, 4, 3),
    # OpenAI's
    "RN50": ClipConfig(1024, 224, 32, 64, (3, 4, 6, 3), 32, 512, 12, 8),
    "RN101": ClipConfig(512, 224, 32, 64, (3, 4, 23, 3), 32, 512, 12, 8),
    "RN50x4": ClipConfig(640, 288, 32, 80, (4, 6, 10, 6), 40, 640, 12, 10),
    "RN50x16": ClipConfig(768, 384, 32, 96, (6, 8, 18, 8), 48, 768, 12, 12),
    "RN50x64": ClipConfig(1024, 448, 32, 128, (3, 15, 36, 10), 64, 1024, 12, 16),
    "ViT-B/32": ClipConfig(512, 224, 32, 768, 12, 12, 512, 12, 8),
    "ViT-B/16": ClipConfig(512, 224, 16, 768, 12, 12, 512, 12, 8),
    "ViT-L/14": ClipConfig(768, 224, 14, 1024, 24, 16, 768, 12, 12),
    "ViT-L/14@336px": ClipConfig(768, 336, 14, 1024, 24, 16, 768, 12, 12),
    # open_clip's
    "ViT-S/32": _open_clip(384, 224, 32, 384, 12, 6, 384, 12, 6),
    "ViT-S/16": _open_clip(384, 224, 16, 384, 12, 6, 384, 12, 6),
    "ViT-M/32": _open_clip(512, 224, 32, 512, 12, 8, 512, 12, 8),
    "ViT-H/14": _open_clip(1024, 224, 14, 1280, 32, 16, 1024, 24, 16),
    "ViT-g/14": _open_clip(1024, 224, 14, 1408, 40, 16, 1024, 24, 16, vision_hidden=6144),
    "ViT-bigG/14": _open_clip(1280, 224, 14, 1664, 48, 16, 1280, 32, 20, vision_hidden=8192),
}


def config_of_name(name: str, argument: str = "name") -> ClipConfig:
    """The sizes of a name, with the activation of whoever spells it so.

    "ViT-B/32" is OpenAI's model, with quick_gelu. "ViT-B-32" is open_clip's, which has gelu, and
    "ViT-B-32-quickgelu" its model with OpenAI's activation; likewise for the others. What both
    spell alike, such as "RN50", is OpenAI's. Published weights need the activation that they were
    trained with.

    Args:
        name: a key of ``CONFIGS`` or open_clip's spelling of one.
        argument: what the name was given as, for the error.

    Raises:
        ValueError: there is no such name; the message suggests the nearest.

    Examples:
        >>> config_of_name("ViT-B/32").activation, config_of_name("ViT-B-32").activation
        ('quick_gelu', 'gelu')
    """
    if name in CONFIGS:
        return CONFIGS[name]
    spelled = {key.replace("/", "-").replace("@336px", "-336"): key for key in CONFIGS}
    plain = name.removesuffix(QUICK)
    key = spelled.get(plain, plain)
    if key not in CONFIGS:
        raise unknown_name(argument, name, [*CONFIGS, *spelled], shown=list(CONFIGS))
    activation = "gelu" if plain == name else "quick_gelu"
    return dataclasses.replace(CONFIGS[key], activation=activation)
