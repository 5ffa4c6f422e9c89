"""`fastvlp.create`: a model, its image transforms and its tokenizer in one call."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastvlp.data.images import recipes
from fastvlp.data.images.preprocess import Preprocess
from fastvlp.data.text import ClipTokenizer
from fastvlp.data.text import files as tokenizer_files
from fastvlp.models import base, clip
from fastvlp.models.checkpoints import load_clip
from fastvlp.train import trained


class Created(NamedTuple):
    """What `create` gives, to be taken apart in this order.

    Attributes:
        model: in evaluation mode, on the device.
        preprocess: a Pillow image to float32 [3, height, width], `preprocess.read(path)` a file.
        tokenizer: captions to int64 ids [n, length].
    """

    model: Any
    preprocess: Preprocess
    tokenizer: Any


def create(
    name: str | os.PathLike[str],
    *,
    pretrained: str | os.PathLike[str] | None = None,
    device: str | torch.device = "cpu",
    tokenizer: str | os.PathLike[str] | None = None,
    activation: str | None = None,
    end_token: int | str | None = None,
    **sizes: Any,
) -> Created:
    """A model with its image transforms and its tokenizer: ``model, preprocess, tokenizer``.

    Args:
        name: the name of a CLIP, in OpenAI's spelling or open_clip's ("ViT-B/32", "ViT-B-32",
            "ViT-B-32-quickgelu"; see `fastvlp.models.clip.config_of_name`), which is freshly
            initialised unless `pretrained` is given; or a path: the folder of a run of `fastvlp
            train`, a model that `fastvlp.models.save` wrote, a published checkpoint of CLIP, ViLT
            or ALBEF, or a folder of open_clip or transformers. A name counts before a path; write
            "./tiny" for a folder called like a model.
        pretrained: file or folder of weights for the named model.
        device: where the model goes.
        tokenizer: a vocabulary. By default the one beside the model, or that of the papers.
        activation: of open_clip's weights, which do not tell it: "gelu" or "quick_gelu".
        end_token: of weights without a configuration, as `load_clip` takes it.
        sizes: fields of `ClipConfig` to change in a freshly initialised model.

    Returns:
        model: in evaluation mode. `model.encode_image(images)` and `model.encode_text(ids)` of a
            CLIP give [n, embed_dim], not normalised.
        preprocess: a Pillow image to float32 [3, height, width]; `preprocess.read(path)` a file.
        tokenizer: a list of captions to int64 ids [n, length]; longer ones are cut.

    Raises:
        FileNotFoundError: a path leads to no model.
        ValueError: `name` is neither a name nor a path, the message suggesting the nearest name; or
            the weights need, or contradict, `activation` or `end_token`.
        TypeError: `sizes` has no such field.

    Examples:
        >>> import torch
        >>> from PIL import Image
        >>> model, preprocess, tokenizer = create("tiny")
        >>> image = preprocess(Image.new("RGB", (80, 60), "red"))[None]
        >>> with torch.inference_mode():
        ...     model.encode_image(image).shape, model.encode_text(tokenizer(["a bus"])).shape
        (torch.Size([1, 512]), torch.Size([1, 512]))
    """
    vocabulary = None if tokenizer is None else Path(tokenizer)
    options = {"activation": activation, "end_token": end_token}
    if _is_path(name):
        _expect_none(f"{name} has weights and sizes already", pretrained=pretrained, **sizes)
        path = Path(name)
        model, _ = trained.load(path, **options)
        return _with_its_own(model, path, vocabulary, device)
    if pretrained is not None:
        _expect_none(f"{pretrained} has sizes already", **sizes)
        path = Path(pretrained)
        model, _ = load_clip(path, name=str(name), **options)
        return _with_its_own(model, path, vocabulary, device)
    _expect_none("the model has no weights yet", end_token=end_token)
    if activation is not None:
        sizes["activation"] = activation
    return _fresh(str(name), device, vocabulary, sizes)


def _is_path(name: str | os.PathLike[str]) -> bool:
    if not isinstance(name, str):
        return True
    try:
        clip.config_of_name(name)
    except ValueError as error:
        if Path(name).exists() or Path(f"{name}.safetensors").exists():
            return True
        raise ValueError(f"{error}; nor is there a file or folder of this name") from None
    return False


def _expect_none(why: str, **values: Any) -> None:
    for argument, value in values.items():
        if value is not None:
            raise ValueError(f"{argument}: expected none, because {why}; got {value!r}")


def _with_its_own(
    model: base.Model, path: Path, vocabulary: Path | None, device: str | torch.device
) -> Created:
    preprocess = Preprocess(trained.recipe(path, model), trained.conversion(path))
    tokenizer = trained.tokenizer(path, model, vocabulary)
    return Created(model.to(device).eval(), preprocess, tokenizer)


def _fresh(
    name: str, device: str | torch.device, vocabulary: Path | None, sizes: dict[str, Any]
) -> Created:
    length = sizes.get("context_length", clip.config_of_name(name).context_length)
    if vocabulary is None:
        tokenizer = ClipTokenizer(context_length=length, truncate=True)
    else:
        tokenizer = tokenizer_files.for_clip(vocabulary, length)
    own = {"vocab_size": tokenizer.vocab_size, "context_length": tokenizer.context_length}
    model = clip.create(name, **own | sizes)
    recipe = recipes.recipe("clip_eval", size=model.config.image_size)
    return Created(model.to(device).eval(), Preprocess(recipe), tokenizer)
