"""The momentum-contrastive loss, its gradient and its hard negatives (ALBEF).

Student and teacher rows both attend to the keys K = [batch ; queue] of the other modality: with
s_ij = <q_i, K_j> / t, a row needs lse_i = log sum_j exp(s_ij) and E_i = sum_j softmax_j(s_i) K_j.
From these follow, with E' of the teacher's row and C the mean of the row's positive keys,

    loss_i = lse_i - <f_i, alpha E'_i + (1 - alpha) C_i> / t
    dloss_i / df_i = (E_i - alpha E'_i - (1 - alpha) C_i) / t

because sum_j y_ij s_ij is linear in the keys. So one pass over the keys gives both, of both
directions in one launch (`keys`), in slices that leave mergeable (reference, sum, weighted keys);
a second launch merges them in a fixed order (`merge`), and torch adds the rows up.

Memory: for each slice fp32 copies of the features of students and teachers, 17 MB for 64 pairs 256
wide on 132 multiprocessors. Nothing of size B x Q.
"""

import torch

from .._core.launch import (
    INTERPRETED,
    UNFUSED,
    ceil_div,
    launch,
    launch_options,
    multiprocessors,
    on_device,
)
from . import merge
from .keys import keys_kernel
from .tiles import HELD_WARPS, WIDEST, power_of_two, tile_constants, tile_of

# Of the keys of a direction; None: as many as keep all multiprocessors at work.
SLICES = 4 if INTERPRETED else None
# At the least: the batch has a slice of its own, whose programs are done soon.
FEWEST_SLICES = 8


def weight_factor(dtype: torch.dtype) -> float:
    """What weights exp(s - reference) are stored times: float16 would lose small ones."""
    return 2.0**14 if dtype is torch.float16 else 1.0


def _slices(device: torch.device, blocks: int, warps: int) -> int:
    """How many slices, of `blocks` programs each, make whole waves of programs that run at once."""
    if SLICES:
        return SLICES
    at_once = multiprocessors(device) * (HELD_WARPS // warps)
    waves = ceil_div(FEWEST_SLICES * blocks, at_once)
    return waves * at_once // blocks


def _pointers(features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{name}_ptr": t for name, t in features.items()}


def _strides(features: dict[str, torch.Tensor]) -> dict[str, int]:
    return {f"stride_{name}": t.stride(0) for name, t in features.items()}


def momentum_contrastive(
    image: torch.Tensor,
    text: torch.Tensor,
    image_momentum: torch.Tensor,
    text_momentum: torch.Tensor,
    image_queue: torch.Tensor,
    text_queue: torch.Tensor,
    ids: torch.Tensor,
    queue_ids: torch.Tensor,
    queue_length: torch.Tensor,
    temperature: torch.Tensor,
    alpha: torch.Tensor,
    seed: torch.Tensor,
    teacher: bool,
    gradients: bool,
    negatives: bool,
    input_precision: str = "ieee",
) -> tuple[torch.Tensor, ...]:
    """Loss [], gradients w.r.t. image, text [B, D] and temperature [], negatives [B] of both.

    Arguments as in the operator's schema: features of one dtype of float32, bfloat16, float16 with
    unit stride along D; ids [B] and queue_ids [Q] int64 or [0]; queue_length and seed [] int64,
    temperature and alpha [] float32, all on the features' device. The gradients cost nothing
    besides the loss; without `gradients` they come back as [0, D].
    """
    batch, width = image.shape
    features = {"image": image, "text": text, "image_momentum": image_momentum,
                "text_momentum": text_momentum}  # fmt: skip
    queues = {"image_queue": image_queue, "text_queue": text_queue}
    flags = {"TEACHER": teacher, "IDS": ids.numel() > 0, "FACTOR": weight_factor(image.dtype)}
    rows = batch * (1 + teacher + flags["IDS"])
    tile, block_d = tile_of(image), max(32, min(WIDEST, power_of_two(width)))
    blocks = ceil_div(rows, tile.block_m), 2 * ceil_div(width, block_d)
    slices = _slices(image.device, blocks[0] * blocks[1], tile.warps)
    sizes = {"B": batch, "D": width, "slices": slices}
    like = {"dtype": torch.float32, "device": image.device}
    reference, sums = torch.empty(2, 2, slices, rows, **like)
    found = {"reference_ptr": reference, "sum_ptr": sums,
             "keys_ptr": torch.empty(2, slices, rows, width, **like)}  # fmt: skip
    sampled = [seed.new_empty(batch if negatives else 0) for _ in range(2)]
    # The interpreter truncates where it should round to bf16: there torch rounds.
    coarse = INTERPRETED and image.dtype is torch.bfloat16
    d_image, d_text = (
        image.new_empty(batch if gradients else 0, width, dtype=torch.float32 if coarse else None)
        for _ in range(2)
    )
    losses, d_temperatures = torch.empty(2, 2 * batch, **like)
    constants = tile_constants(tile, width, image.dtype, input_precision)
    constants["EVEN_D"] &= width % block_d == 0
    with on_device(image):
        launch(
            keys_kernel, (*blocks, slices),
            _pointers(features | queues)
            | {"ids_ptr": ids, "queue_ids_ptr": queue_ids, "length_ptr": queue_length,
               "temperature_ptr": temperature, "seed_ptr": seed}
            | found | {"text_negative_ptr": sampled[0], "image_negative_ptr": sampled[1]},
            sizes | _strides(features | queues),
            flags | {"NEGATIVES": negatives, "ONE_BLOCK": width <= block_d, "BLOCK_D": block_d}
            | constants,
            launch_options(tile),
        )  # fmt: skip
        launch(
            merge.merge_kernel, (batch, 2, 1),
            _pointers(features)
            | {"temperature_ptr": temperature, "alpha_ptr": alpha} | found
            | {"d_image_ptr": d_image, "d_text_ptr": d_text, "loss_ptr": losses,
               "d_temperature_ptr": d_temperatures},
            sizes | _strides(features) | {"share": 0.5 / batch},
            flags | {"GRADIENTS": gradients} | merge.merge_constants(slices, width),
            {"num_warps": merge.WARPS, **UNFUSED},
        )  # fmt: skip
        loss, d_temperature = losses.sum(), d_temperatures.sum()
    return loss, d_image.to(image.dtype), d_text.to(text.dtype), d_temperature, *sampled
