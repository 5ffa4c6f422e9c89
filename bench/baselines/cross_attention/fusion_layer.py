"""What cross_attention.py --layer compares: one fusion layer over the pairs of a step.

Every image has four pairs: its own caption, two hard negatives, and the caption masked for
MLM. fastvlp packs the captions and groups them by image; the peers pad them, and repeat the
image for each pair, so that its keys and values are projected four times. Gradients to text,
images and parameters are computed. Dropout is off, so that all have one result; what a peer
repeats or pads is prepared before the clock starts, and gradients to the repeated images are
not summed by it.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from _harness.measure import BOUND, DTYPES, OURS, Implementation
from _harness.run import Run
from _harness.timing import Call
from torch import Tensor

from baselines.contrastive.softmax import compiled
from baselines.cross_attention import inputs as attention_inputs

PAIRS = 4
WIDTH, HEADS = 768, 12
OP = "fusion_layer"
# What the error of a row is taken over. The gradient to a key's bias is zero but for rounding, so
# that its relative error says nothing; those to all parameters are recorded as well.
JUDGED = ("out", "d_text", "d_images")


@dataclass(frozen=True)
class LayerCase:
    """`random_lengths`: captions of 5 to 30 tokens, else all of 30."""

    images: int
    keys: int
    dtype: str
    random_lengths: bool
    device: str
    width: int = WIDTH
    heads: int = HEADS

    def shape(self) -> dict[str, int]:
        return {"images": self.images, "pairs": PAIRS, "keys": self.keys, "width": self.width}

    def op(self) -> str:
        return OP + (", random lengths" if self.random_lengths else "")


@dataclass(frozen=True)
class LayerInputs:
    """Packed text [total, width], pairs of one image after another; images [n, keys, width]."""

    text: Tensor
    images: Tensor
    lengths: tuple[int, ...]
    upstream: Tensor
    state: Mapping[str, Tensor]
    heads: int


def draw(case: LayerCase) -> LayerInputs:
    from fastvlp.nn import PaddedFusionLayer

    generator = torch.Generator().manual_seed(0)
    low, high = attention_inputs.CAPTION
    pairs = case.images * PAIRS
    lengths = torch.randint(
        low if case.random_lengths else high, high + 1, (pairs,), generator=generator
    )
    total = int(lengths.sum())

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(case.device, DTYPES[case.dtype])

    torch.manual_seed(0)
    layer = PaddedFusionLayer(case.width, case.heads).to(case.device, DTYPES[case.dtype])
    return LayerInputs(
        normal(total, case.width),
        normal(case.images, case.keys, case.width),
        tuple(lengths.tolist()),
        normal(total, case.width),
        layer.state_dict(),
        case.heads,
    )


def run(layer: torch.nn.Module, call: Any, leaves: list[Tensor], upstream: Tensor) -> Call:
    """A call that computes output and gradients to `leaves` and every parameter."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    parameters = list(layer.parameters())

    def step() -> dict[str, Tensor]:
        out = call(*leaves)
        gradients = torch.autograd.grad(out, leaves + parameters, upstream)
        names = ("d_text", "d_images", *(f"d_{name}" for name, _ in layer.named_parameters()))
        return {"out": out.detach()} | dict(zip(names, gradients, strict=True))

    return step


def ours(inputs: LayerInputs) -> Call:
    from fastvlp.nn import FusionLayer

    width = inputs.text.shape[-1]
    layer = FusionLayer(width, inputs.heads, dropout=0.0, attention_dropout=0.0)
    layer.load_state_dict(dict(inputs.state))
    layer.to(inputs.text.device, inputs.text.dtype)
    device = str(inputs.text.device)
    rows = [sum(group) for group in zip(*[iter(inputs.lengths)] * PAIRS, strict=True)]
    pairs = attention_inputs.cumulative(inputs.lengths, device)
    images = attention_inputs.cumulative(rows, device)

    def call(text: Tensor, tokens: Tensor) -> Tensor:
        return layer(
            text, pairs, tokens, images, max_seqlen_pairs=max(inputs.lengths),
            max_seqlen_images=max(rows),
        )  # fmt: skip

    return run(layer, call, [inputs.text, inputs.images], inputs.upstream)


def padded(attention: str, compile_: bool, inputs: LayerInputs) -> Call:
    """transformers' BertLayer with an attention of its own choice, over padded pairs."""
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertLayer

    width = inputs.text.shape[-1]
    config = BertConfig(
        hidden_size=width, num_attention_heads=inputs.heads, intermediate_size=4 * width,
        is_decoder=True, add_cross_attention=True, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, attn_implementation=attention,
    )  # fmt: skip
    layer = BertLayer(config, layer_idx=0)
    layer.load_state_dict(dict(inputs.state))
    layer.to(inputs.text.device, inputs.text.dtype)
    text = attention_inputs.pad(inputs.text, inputs.lengths)
    filled = attention_inputs.filled(inputs.lengths, text.device)
    # A boolean mask for SDPA; the additive form it replaces in eager attention.
    mask = filled[:, None, None, :]
    if attention == "eager":
        low = torch.finfo(text.dtype).min
        mask = torch.zeros(mask.shape, dtype=text.dtype, device=text.device).masked_fill(~mask, low)
    images = inputs.images.repeat_interleave(PAIRS, 0)

    call = functools.partial(call_of, layer, mask)
    call = compiled(call) if compile_ else call()
    return run(layer, call, [text, images], attention_inputs.pad(inputs.upstream, inputs.lengths))


def call_of(layer: torch.nn.Module, mask: Tensor) -> Any:
    return lambda tokens, images: layer(tokens, mask, encoder_hidden_states=images)


def packed_results(inputs: LayerInputs, results: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Padded results as fastvlp's: rows packed, an image's gradients summed over its pairs."""
    filled = attention_inputs.filled(inputs.lengths, inputs.text.device)
    found = dict(results)
    for name in ("out", "d_text"):
        found[name] = found[name][filled]
    found["d_images"] = found["d_images"].unflatten(0, (-1, PAIRS)).sum(1)
    return found


def reference(inputs: LayerInputs) -> dict[str, Tensor]:
    """Output and gradients in float64, through the padded layer's definition."""
    from fastvlp.nn import PaddedFusionLayer

    wide = replace(inputs, text=inputs.text.double(), images=inputs.images.double())
    layer = PaddedFusionLayer(
        inputs.text.shape[-1], inputs.heads, dropout=0.0, attention_dropout=0.0
    )
    layer.load_state_dict(dict(inputs.state))
    layer.to(inputs.text.device, torch.float64)
    filled = attention_inputs.filled(inputs.lengths, inputs.text.device)
    call = run(
        layer,
        lambda text, images: layer(text, filled, images),
        [attention_inputs.pad(wide.text, inputs.lengths), wide.images.repeat_interleave(PAIRS, 0)],
        attention_inputs.pad(inputs.upstream.double(), inputs.lengths),
    )
    return packed_results(inputs, call())


def matmuls(inputs: LayerInputs) -> Call:
    """The matmuls of the linear maps alone, forward and backward, each image projected once."""
    width = inputs.text.shape[-1]
    rows, keys = len(inputs.text), inputs.images.shape[0] * inputs.images.shape[1]
    steps = []
    for count, n_in, n_out, times in (
        (rows, width, width, 6),
        (keys, width, width, 2),
        (rows, width, 4 * width, 1),
        (rows, 4 * width, width, 1),
    ):
        x, w, y = (
            torch.randn(*shape, device=inputs.text.device).to(inputs.text.dtype)
            for shape in ((count, n_in), (n_out, n_in), (count, n_out))
        )
        outs = torch.empty_like(y), torch.empty_like(x), torch.empty_like(w)
        operands = ((x, w.T), (y, w), (y.T, x))
        steps += [(*pair, out) for pair, out in zip(operands, outs, strict=True)] * times

    def call() -> None:
        for left, right, out in steps:
            torch.mm(left, right, out=out)

    return call


def implementations() -> list[Implementation]:
    found = [
        Implementation(OURS, ours),
        Implementation(
            BOUND,
            matmuls,
            bound=True,
            note="torch.mm for the linear layers alone, without attention",
            extra={"matmuls": "linear"},
        ),
    ]
    for attention in ("sdpa", "eager"):
        for compile_ in (False, True):
            found.append(
                Implementation(
                    f"BertLayer, {attention}" + ", compiled" * compile_,
                    functools.partial(padded, attention, compile_),
                    compiled=compile_,
                    unify=packed_results,
                )
            )
    return found


def measure_layers(args: argparse.Namespace, run: Run) -> None:
    """Compare the layers at each dtype with full and with random lengths."""
    for dtype in args.dtype:
        for random_lengths in (False, True):
            case = LayerCase(args.batch, args.keys, dtype, random_lengths, args.device)
            run.compare(
                case.op(),
                implementations(),
                functools.partial(draw, case),
                functools.partial(draw, replace(case, images=1, keys=min(case.keys, 40))),
                dtype=dtype,
                shape=case.shape(),
                reference=reference,
                judged=JUDGED,
            )
