"""Where in an image a text lies, by GradCAM on ALBEF's cross-attention.

Li et al., arXiv 2107.07651, section 5 (weakly supervised visual grounding) and figure 4; Selvaraju
et al., "Grad-CAM", arXiv 1610.02391, section 3. With A the cross-attention weights of one fusion
layer and s the matching logit of the pair,

    map(patch) = mean over words w and heads h of A(h, w, patch) max(0, ds / dA(h, w, patch))

The layer is that of index 8 counted over text and fusion layers, the third fusion layer, where the
authors found it sharpest. Only that layer stores its weights; the others use the fused kernel.

The mean is over a text's own tokens. The authors divide by the padded length, which scales a map as
a whole and changes no comparison within it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvlp.models.albef.model import Albef
from fastvlp.models.albef.tasks.common import Texts, check_evaluating
from fastvlp.ops.packing import PairLayout

LAYER = 8  # of all 12


def grounding_maps(
    model: Albef,
    images: Tensor,
    text_ids: Tensor,
    text_mask: Tensor | list[int],
    image_of_text: Tensor | Sequence[int] | None = None,
    *,
    layer: int = LAYER,
    return_match: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Maps [texts, grid, grid] on the patches of each text's image, at least float32, from 0 on.

    The gradients of the model's parameters stay as they are.

    Args:
        model: in evaluation mode; frozen parameters do no harm.
        images: [n, 3, image_size, image_size], normalised.
        text_ids, text_mask: int [texts, length], and bool [texts, length] or the lengths.
        image_of_text: whole numbers [texts]; None: text i belongs to image i.
        layer: which one, counted over text and fusion layers.
        return_match: also the probability that text and image match, [texts], of the matching head.

    Raises:
        TypeError, ValueError: an argument is not as described.
        RuntimeError: the model is in training mode.
    """
    check_evaluating(model)
    config = model.config
    last = config.text_layers + config.fusion_layers
    if not config.text_layers <= layer < last:
        raise ValueError(
            f"layer: expected a fusion layer, {config.text_layers} to {last - 1}, got {layer}"
        )
    model.student.visual_encoder.check(images)
    texts = Texts.make(config, text_ids, text_mask, images.device)
    if image_of_text is None:
        image_of_text = range(len(images))
    owner = torch.as_tensor(image_of_text, dtype=torch.int64).cpu()
    if len(owner) != len(texts.ids) or (owner < 0).any() or (owner >= len(images)).any():
        raise ValueError(
            f"image_of_text: expected 0 to {len(images) - 1} for each of {len(texts.ids)} texts, "
            f"got {owner.tolist()}"
        )
    with torch.no_grad():
        tokens = model.student.encode_image(images)
    # [texts, length, heads, keys], zeros where there is no word
    weights, gradients, logits = (_plain if model.reference else _packed)(
        model, tokens, texts, owner, layer - config.text_layers
    )
    side = config.image_size // config.patch_size
    cam = (weights * gradients.clamp(min=0))[..., 1:].mean(2).sum(1)
    lengths = torch.tensor(texts.layout.lengths, device=cam.device)
    maps = (cam / lengths[:, None]).unflatten(1, (side, side))
    return (maps, _wide(logits).softmax(1)[:, 1]) if return_match else maps


def _packed(model: Albef, tokens: Tensor, texts: Texts, owner: Tensor, at: int):
    pairs = PairLayout.make(texts.layout, torch.arange(len(owner)), owner, len(tokens))
    layers = model.student.text_encoder.fusion
    where = dict(
        cu_seqlens_images=pairs.cu_seqlens_images,
        max_seqlen_pairs=pairs.max_seqlen_pairs,
        max_seqlen_images=pairs.max_seqlen_images,
    )
    with torch.no_grad():
        x = pairs.expand(model.student.encode_text(texts.ids, texts.layout))
        for each in layers[:at]:
            x = each(x, pairs.cu_seqlens_pairs, tokens, **where)
    with torch.enable_grad():
        # With all parameters frozen the graph begins here.
        x, probs = layers[at](
            x.requires_grad_(), pairs.cu_seqlens_pairs, tokens, return_probs=True, **where
        )
        for each in layers[at + 1 :]:
            x = each(x, pairs.cu_seqlens_pairs, tokens, **where)
        logits = model.itm_head(pairs.first(x))
        (gradient,) = torch.autograd.grad(logits[:, 1].sum(), probs)
    rows = pairs.select(range(len(owner)))
    maps = (texts.layout.unpack(rows(_wide(t.detach()))) for t in (probs, gradient))
    return *maps, logits.detach()


def _plain(model: Albef, tokens: Tensor, texts: Texts, owner: Tensor, at: int):
    layers, tokens = model.student.text_encoder.fusion, tokens[owner.to(tokens.device)]
    with torch.no_grad():
        x = model.student.encode_padded(texts.ids, texts.mask)
        for each in layers[:at]:
            x = each.padded(x, texts.mask, tokens)
    with torch.enable_grad():
        x, probs = layers[at].padded(x.requires_grad_(), texts.mask, tokens, return_probs=True)
        for each in layers[at + 1 :]:
            x = each.padded(x, texts.mask, tokens)
        logits = model.itm_head(x[:, 0])
        (gradient,) = torch.autograd.grad(logits[:, 1].sum(), probs)
    words = texts.mask[:, :, None, None]
    maps = (_wide(t.detach()).transpose(1, 2) * words for t in (probs, gradient))
    return *maps, logits.detach()


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def box_scores(
    heat: Tensor, boxes: Tensor, image_size: tuple[int, int], *, power: float = 0.5
) -> Tensor:
    """sum / area^power of a map in boxes, [boxes], float64: the largest is the answer.

    The map is resized to the image first, bicubic.

    Args:
        heat: [grid, grid], a map of `grounding_maps`.
        boxes: [boxes, 4] left, top, width, height in whole pixels of the image, such as a
            detector's proposals; what lies outside of the image counts as area only.
        image_size: height and width of the image that the boxes refer to.

    Raises:
        ValueError: an argument is not as described.
    """
    if heat.dim() != 2:
        raise ValueError(f"heat: expected one map [grid, grid], got {tuple(heat.shape)}")
    if boxes.dim() != 2 or boxes.shape[1] != 4 or (boxes[:, 2:] <= 0).any():
        raise ValueError(
            f"boxes: expected [boxes, 4], left, top, width, height above 0, got "
            f"{tuple(boxes.shape)}"
        )
    height, width = image_size
    resized = F.interpolate(heat[None, None].double(), size=(height, width), mode="bicubic")[0, 0]
    # Each box by four look-ups in the sums over all rectangles from the corner.
    sums = F.pad(resized.cumsum(0).cumsum(1), (1, 0, 1, 0))
    left, top, wide, high = boxes.to(heat.device).long().unbind(1)
    right, bottom = (
        (a + b).clamp(0, most) for a, b, most in ((left, wide, width), (top, high, height))
    )
    left, top = left.clamp(0, width), top.clamp(0, height)
    inside = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
    return inside / (wide * high).double() ** power
