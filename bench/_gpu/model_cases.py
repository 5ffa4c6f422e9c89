"""What gpu_model.py compares: per op our kernels, the peers' own, their eager forms and the floor.

Kernels run through their launchers on a virtual GPU at two small sizes, and are compiled for the
true one. Eager forms run on fake tensors of the true size: of them only the operations are
recorded, under the autocast of a CPU, which leaves softmax in bfloat16 and so moves fewer bytes
than that of a GPU. Peers ask whether their tensors are CUDA tensors, which these claim to be.
"""

from __future__ import annotations

import math
from functools import partial

import torch

from _gpu.launches import TorchOp
from _gpu.model_case import BF16, Case, ModelledImplementation, gradient, leaves, matmuls
from _gpu.model_heads import soft_cross_entropy
from _gpu.model_pairs import contrastive, sigmoid


def our_momentum(batch: int, dim: int, queue: int):
    from fastvlp.kernels.momentum_contrastive import momentum_contrastive

    image, text, image_m, text_m = torch.full((4, batch, dim), 0.05, dtype=BF16)
    queues = torch.full((2, queue, dim), 0.05, dtype=BF16)
    none = torch.empty(0, dtype=torch.int64)
    length, seed = torch.tensor(queue), torch.tensor(0)
    temperature, alpha = torch.tensor(0.07), torch.tensor(0.4)

    def call():
        momentum_contrastive(
            image, text, image_m, text_m, *queues, none, none, length, temperature, alpha, seed,
            teacher=True, gradients=True, negatives=False,
        )  # fmt: skip

    return call


def eager_momentum(batch: int, dim: int, queue: int):
    import momentum_contrastive

    features = leaves((batch, dim), (batch, dim), dtype=torch.float32)
    teacher = leaves((batch, dim), (batch, dim), dtype=torch.float32)
    columns = leaves((dim, queue), (dim, queue), dtype=torch.float32)
    temperature = torch.tensor(0.07, requires_grad=True)

    def call():
        with torch.autocast("cpu", BF16):
            loss = momentum_contrastive.paper(
                *features, teacher, [c.detach() for c in columns], temperature
            )
        gradient(loss, *features, temperature)

    return call


def momentum(queue: int, batch: int = 64, dim: int = 256) -> Case:
    implementations = [
        ModelledImplementation("fastvlp", partial(our_momentum, batch, dim), (4096, 12288)),
        ModelledImplementation(
            "paper's formula, autocast", partial(eager_momentum, batch, dim), eager=True
        ),
    ]
    return Case(
        "momentum_contrastive", {"b": batch, "q": queue, "d": dim}, queue, implementations,
        matmuls(6, batch, queue, dim, 2 * 2 * queue * dim),
        "both queues once, and for each direction two matmuls of logits and one of gradients",
        missing=(("peers", "no kernel library has this loss"),),
    )  # fmt: skip


def our_alignment(words: int, patches: int, width: int, pairs: int):
    from fastvlp.kernels.word_patch_alignment import (
        word_patch_alignment,
        word_patch_alignment_gradients,
    )

    x = torch.full((pairs, words, width), 0.05, dtype=BF16)
    y = torch.full((pairs, patches, width), 0.05, dtype=BF16)
    masks = (torch.zeros(t.shape[:2], dtype=torch.bool) for t in (x, y))
    upstream, masks = torch.ones(pairs), tuple(masks)

    def call():
        _, *saved = word_patch_alignment(x, y, *masks)
        word_patch_alignment_gradients(upstream, x, y, *saved)

    return call


def eager_alignment(words: int, patches: int, width: int, pairs: int):
    from baselines.word_patch_alignment import peers

    x, y = leaves((pairs, words, width), (pairs, patches, width))
    masks = [torch.zeros(t.shape[:2], dtype=torch.bool) for t in (x, y)]

    def call():
        gradient(peers.vilt_distance(x, y, *masks).sum(), x, y)

    return call


def word_patch_alignment(pairs: int, words=40, patches=200, width=768) -> Case:
    sizes = (words, patches, width)
    implementations = [
        ModelledImplementation("fastvlp", partial(our_alignment, *sizes), (1, 2)),
        ModelledImplementation(
            "ViLT's formula, batched", partial(eager_alignment, *sizes), eager=True
        ),
    ]
    moved = 2 * 2 * pairs * (words + patches) * width
    return Case(
        "word_patch_alignment", {"b": pairs, "lx": words, "ly": patches, "d": width}, pairs,
        implementations, TorchOp("floor", moved, 3 * 2 * pairs * words * patches * width, "bf16"),
        "3 matmuls and the features and gradients once, without the 50 iterations",
        missing=(("peers", "no kernel library has this op"),),
    )  # fmt: skip


def our_attention(queries, keys, heads, width, backward: bool, images: int):
    from fastvlp.kernels.cross_attention import cross_attention_forward
    from fastvlp.kernels.cross_attention.backward import cross_attention_backward

    q, grad = torch.full((2, images * queries, heads, width), 0.05, dtype=BF16)
    k, v = torch.full((2, images, keys, heads, width), 0.05, dtype=BF16)
    starts = torch.arange(images + 1, dtype=torch.int32) * queries
    given = (starts, None, None, torch.tensor([0]))
    options = {"scale": width**-0.5, "dropout_p": 0.0, "causal": False,
               "max_seqlen_q": queries, "max_seqlen_k": keys}  # fmt: skip

    def call():
        out, statistics = cross_attention_forward(q, k, v, *given, **options)
        if backward:
            cross_attention_backward(grad, q, k, v, out, statistics, *given, **options)

    return call


def eager_attention(queries, keys, heads, width, backward: bool, images: int):
    shapes = [(images, heads, rows, width) for rows in (queries, keys, keys)]
    q, k, v = leaves(*shapes)

    def call():
        p = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(width), -1)
        out = p @ v
        if backward:
            gradient(out.sum(), q, k, v)

    return call


def cross_attention(images: int, queries=30, keys=577, heads=12, width=64, backward=True) -> Case:
    sizes = (queries, keys, heads, width, backward)
    implementations = [
        ModelledImplementation(
            # The tiles are those of all the images: of the multiprocessors each has its share.
            "fastvlp", partial(our_attention, *sizes), (1,),
            multiprocessors=lambda size: max(1, round(132 * size / images)),
        ),
        ModelledImplementation("eager attention", partial(eager_attention, *sizes), eager=True),
    ]  # fmt: skip
    each = images * heads * width
    one = 2 * each * queries * keys
    read = 2 * each * 2 * (keys + queries)
    return Case(
        "cross_attention", {"b": images, "h": heads, "q": queries, "k": keys, "d": width}, images,
        implementations,
        TorchOp("floor", 2 * each * (6 * keys + 5 * queries), 6 * one, "bf16")
        if backward
        else TorchOp("floor", read, 2 * one, "bf16"),
        "6 matmuls; keys, values and queries read for each pass and the gradients written"
        if backward
        else "2 matmuls; keys, values and queries read once and the output written",
        phase="fwd+bwd" if backward else "fwd",
        missing=(("FlashAttention", "is CUDA C++ of its own, which is not compiled here"),),
    )  # fmt: skip


def our_ema(adamw: bool, elements: int):
    """One tensor of each kind, of which a dry run touches nothing."""
    from fastvlp.ops import adamw_ema, ema

    weight, gradient, first, second, average = ([torch.empty(elements)] for _ in range(5))
    low, average_low = ([torch.empty(elements, dtype=BF16)] for _ in range(2))

    def call():
        if adamw:
            adamw_ema(
                weight, gradient, first, second, average, low, average_low,
                step=10, lr=1e-4, decay=0.995,
            )  # fmt: skip
        else:
            ema(average, weight, 0.995, average_low)

    return call


def foreach_ema(adamw: bool, elements: int):
    weight, average = ([torch.empty(elements)] for _ in range(2))
    low, average_low = ([torch.empty(elements, dtype=BF16)] for _ in range(2))

    def call():
        if adamw:
            torch._foreach_copy_(low, weight)
        torch._foreach_lerp_(average, weight, 0.005)
        torch._foreach_copy_(average_low, average)

    return call


def ema(millions: int, adamw: bool) -> Case:
    elements = millions * 1_000_000
    peer = "fused AdamW, foreach and copies" if adamw else "foreach and copy"
    # Weights and both moments read and written, gradients read.
    fused = (TorchOp("fused AdamW", 28 * elements),) if adamw else ()
    implementations = [
        # Whole chunks of 8,192 elements, one for each block.
        ModelledImplementation("fastvlp", partial(our_ema, adamw), (8 * 8192,), native=True),
        ModelledImplementation(peer, partial(foreach_ema, adamw), around=fused, eager=True),
    ]
    note = "weights read, averages read and written, copies written"
    if adamw:
        note = "weights, both moments and averages read and written, gradients read, copies written"
    return Case(
        "ema", {"millions": millions}, elements, implementations,
        TorchOp("floor", (40 if adamw else 14) * elements), note, dtype="fp32",
        phase="AdamW, update and bf16 copies" if adamw else "update and bf16 copy",
        missing=(("peers", "no kernel library has the update; apex is CUDA C++ of its own"),),
    )  # fmt: skip


def cases(quick: bool) -> list[Case]:
    """Every op; two of them at small sizes where quick."""
    if quick:
        return [sigmoid(8192, 128), soft_cross_entropy(256, 128, 4096)]
    found = [contrastive(n) for n in (8192, 32768, 65536)]
    found += [sigmoid(n) for n in (8192, 32768)]
    found.append(momentum(65536))
    found += [cross_attention(32, q, backward=b) for q in (30, 120) for b in (False, True)]
    found += [soft_cross_entropy(1000, teacher=teacher) for teacher in (True, False)]
    found += [ema(145, adamw) for adamw in (False, True)]
    return [*found, word_patch_alignment(64)]
