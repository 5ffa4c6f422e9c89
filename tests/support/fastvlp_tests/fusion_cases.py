"""Texts, images and pairs for the fusion layer, and its runs in packed and in padded form."""

from types import SimpleNamespace

import torch

from fastvlp.nn import FusionLayer, PaddedFusionLayer
from fastvlp.ops.packing import PairLayout, TextLayout

LENGTHS = [5, 2, 7, 1, 0]
# In no order, a text in several pairs, the empty text in one; image 2 has no pair.
PAIRS = [(0, 0), (1, 1), (2, 3), (3, 3), (2, 0), (0, 1), (4, 1), (1, 0)]
IMAGES = 4


def case(width=32, image_width=24, keys=9, masked=False, seed=0, device="cpu"):
    """Float64 tensors; `upstream` is by pair and place in the padded text."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(device)

    mask = None
    if masked:
        mask = torch.rand(IMAGES, keys, generator=generator) > 0.3
        mask[0] = torch.arange(keys) != keys // 2  # a hole
        mask[3, :] = False  # no key at all
        mask = mask.to(device)
    return SimpleNamespace(
        text=draw(len(LENGTHS), max(LENGTHS), width),
        images=draw(IMAGES, keys, image_width),
        upstream=draw(len(PAIRS), max(LENGTHS), width),
        key_mask=mask,
        device=torch.device(device),
    )


def layers(*args, seed=1, **kwargs):
    """A packed and a padded layer with the same float64 weights, none of them at its initial 0."""
    torch.manual_seed(seed)
    packed = FusionLayer(*args, **kwargs).double()
    with torch.no_grad():
        for parameter in packed.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    padded = PaddedFusionLayer(*args, **kwargs).double()
    padded.load_state_dict(packed.state_dict())
    return packed, padded


def layout(device="cpu"):
    texts = TextLayout.from_lengths(LENGTHS, max(LENGTHS), device)
    pairs = PairLayout.make(texts, [t for t, _ in PAIRS], [i for _, i in PAIRS], IMAGES)
    return texts, pairs


def packed_forward(layer, text, images, **kwargs):
    """Padded texts in, the result of each pair's tokens padded in the order of PAIRS out."""
    texts, pairs = layout(text.device)
    tokens = pairs.expand(texts.pack(text))
    kwargs |= dict(max_seqlen_pairs=pairs.max_seqlen_pairs)
    if images is not None:
        kwargs |= dict(images=images, cu_seqlens_images=pairs.cu_seqlens_images)
        kwargs |= dict(max_seqlen_images=pairs.max_seqlen_images)
    out = layer(tokens, pairs.cu_seqlens_pairs, **kwargs)
    in_pair_order = pairs.select(range(len(PAIRS)))(out)
    by_pair = TextLayout.from_lengths([LENGTHS[t] for t, _ in PAIRS], max(LENGTHS), text.device)
    return by_pair.unpack(in_pair_order)


def text_mask(device="cpu"):
    lengths = torch.tensor([LENGTHS[t] for t, _ in PAIRS], device=device)
    return torch.arange(max(LENGTHS), device=device) < lengths[:, None]


def padded_forward(layer, text, images, key_mask=None, **kwargs):
    """The same in padded form, zeros in padding."""
    mask = text_mask(text.device)
    text_index = [t for t, _ in PAIRS]
    image_index = [i for _, i in PAIRS]
    if images is not None:
        kwargs |= dict(images=images[image_index])
        kwargs |= dict(key_mask=None if key_mask is None else key_mask[image_index])
    out = layer(text[text_index], mask, **kwargs)
    return torch.where(mask[..., None], out, 0)


def gradients(forward, layer, c, dtype, autocast=False, **kwargs):
    """Output and gradients w.r.t. texts, images and parameters, of a copy in `dtype`."""
    layer = layer.to(dtype).to(c.device)
    layer.zero_grad()
    text, images = (
        None if x is None else x.to(dtype).detach().requires_grad_() for x in (c.text, c.images)
    )
    with torch.autocast(c.device.type, torch.bfloat16, enabled=autocast):
        out = forward(layer, text, images, **kwargs)
    mask = text_mask(c.device)[..., None]
    out.backward(torch.where(mask, c.upstream, 0).to(out.dtype))
    inputs = {"text": text} if images is None else {"text": text, "images": images}
    found = {"out": out.detach()} | {name: x.grad for name, x in inputs.items()}
    return found | {name: p.grad.clone() for name, p in layer.named_parameters()}
