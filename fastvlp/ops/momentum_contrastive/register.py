"""Registers the momentum-contrastive operator with torch, and calls it.

The schema and the CPU kernels come with the compiled library (csrc/schema.cpp). On CUDA tensors
the Triton kernels run.
"""

import torch

from .. import compiled
from .._core.implement import implement

# Student rows whose logits, and their teachers', are computed together: 128 rows fill the
# registers' tiles, and their sums of keys stay in cache together with a block of keys.
_GROUP_ROWS = 64
# Bytes that a block of keys, its packed copy, its logits and weights may take of a core's cache.
_BLOCK_BYTES = 640 << 10
_GRAIN = 32


def plan(batch: int, dim: int, element: int) -> tuple[int, int]:
    """(group_rows, block_keys): how many student rows and keys are processed together."""
    groups = -(-batch // _GROUP_ROWS)
    group_rows = -(-batch // (groups * _GRAIN)) * _GRAIN
    per_key = 2 * element * dim + 2 * group_rows * (4 + element)
    block_keys = _BLOCK_BYTES // per_key // _GRAIN * _GRAIN
    return group_rows, max(_GRAIN, min(block_keys, 512))


def run(tensors, teacher: bool, gradients: bool, negatives: bool) -> tuple[torch.Tensor, ...]:
    """The operator on the reference's arguments, None where there are no ids."""
    *features, temperature, alpha, ids, queue_ids, length, seed = tensors
    batch, dim = features[0].shape
    none = seed.new_empty(0)
    return torch.ops.fastvlp.momentum_contrastive(
        *features, none if ids is None else ids, none if queue_ids is None else queue_ids, length,
        temperature, alpha, seed, teacher, gradients, negatives,
        *plan(batch, dim, features[0].element_size()),
    )  # fmt: skip


def _fake(
    image, text, image_momentum, text_momentum, image_queue, text_queue, ids, queue_ids, length,
    temperature, alpha, seed, teacher, gradients, negatives, *_,
):  # fmt: skip
    rows, dim = image.shape
    kept, sampled = rows if gradients else 0, rows if negatives else 0
    return (
        temperature.new_empty(()),
        image.new_empty(kept, dim),
        text.new_empty(kept, dim),
        temperature.new_empty(()),
        seed.new_empty(sampled),
        seed.new_empty(sampled),
    )


def _triton(*args):
    from ...kernels.momentum_contrastive import momentum_contrastive

    return momentum_contrastive(*args[:-2])


def register_operators() -> None:
    """Called once when `fastvlp.ops` is imported; does nothing where there are no schemas."""
    if compiled.missing_schemas():
        return
    # Without a rule of autograd: an autograd function calls it, and nothing differentiates it.
    torch.library.register_fake("fastvlp::momentum_contrastive", _fake)
    implement("momentum_contrastive", _triton, "CUDA")
