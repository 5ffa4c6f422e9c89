"""The contrastive and the sigmoid loss for gpu_model.py: ours, the peers' kernels, eager forms."""

from __future__ import annotations

from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F

from _gpu.model_case import (
    BF16,
    WORKSPACE,
    Case,
    ModelledImplementation,
    claiming_cuda,
    gradient,
    leaves,
    matmuls,
)

# Pairs of the sizes at which our kernels are executed: two rows of blocks at least.
EXECUTED = (512, 1024)


def our_contrastive(dim: int, n: int):
    from fastvlp.kernels.contrastive import contrastive_statistics, forward
    from fastvlp.kernels.contrastive.backward import contrastive_gradients

    x, y = torch.full((2, n, dim), 0.01, dtype=BF16)
    scale, half, weights = torch.tensor(10.0), torch.full((n,), 0.5), torch.full((2,), 0.5)

    def call():
        # What is executed goes in two chunks, so that every kind of merge is among it.
        height = (lambda *_: n // 2) if n <= max(EXECUTED) else forward._chunk_height
        with mock.patch.object(forward, "_chunk_height", height):
            rows, cols, _ = contrastive_statistics(x, y, scale)
        contrastive_gradients(
            x, y, scale, rows, cols, half, weights, workspace_bytes=workspace(n, n, dim)
        )

    return call


def workspace(rows: int, cols: int, dim: int) -> int:
    """Of a chunk that the plan for a GPU makes of bf16 features."""
    from fastvlp.ops.contrastive.plan import make_gpu_plan

    plan = make_gpu_plan(rows, cols, dim, BF16, WORKSPACE, torch.device("cpu"))
    return plan.block_rows * (-(-cols // 16) * 16) * 2


def infcl(dim: int, n: int):
    from inf_cl import cal_flash_loss

    x, y = leaves((n, dim), (n, dim))
    scale = torch.tensor(10.0, requires_grad=True)

    def call():
        with claiming_cuda():
            loss = cal_flash_loss(x, y, scale=scale).mean()
            gradient((loss + cal_flash_loss(y, x, scale=scale).mean()) / 2, x, y, scale)

    return call


def memeff(dim: int, n: int):
    from memeff import MemoryEfficientCLIPLoss

    x, y = leaves((n, dim), (n, dim))
    loss = MemoryEfficientCLIPLoss(temperature=0.1, normalized_inputs=True, stable=False)

    def call():
        with claiming_cuda():
            gradient(loss(x, y), x, y)

    return call


def eager_contrastive(dim: int, n: int):
    """open_clip's formula under autocast."""
    x, y = leaves((n, dim), (n, dim))
    scale = torch.tensor(10.0, requires_grad=True)

    def call():
        with torch.autocast("cpu", BF16):
            logits = scale * x @ y.T
            labels = torch.arange(n)
            loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        gradient(loss, x, y, scale)

    return call


def contrastive(n: int, dim: int = 512) -> Case:
    small = (256, 512)
    implementations = [
        ModelledImplementation("fastvlp", partial(our_contrastive, dim), EXECUTED),
        ModelledImplementation("inf-cl", partial(infcl, dim), (128, 256), needs="inf_cl"),
        ModelledImplementation("memeff", partial(memeff, dim), small, needs="memeff"),
        ModelledImplementation(
            "open_clip's formula, autocast", partial(eager_contrastive, dim), eager=True
        ),
    ]
    return Case(
        "contrastive", {"n": n, "d": dim}, n, implementations,
        matmuls(3, n, n, dim, 4 * 2 * n * dim),
        "3 matmuls: the logits and two gradients, and the features and gradients once",
    )  # fmt: skip


def our_sigmoid(dim: int, n: int):
    from fastvlp.kernels.contrastive.sigmoid import sigmoid_contrastive

    x, y = torch.full((2, n, dim), 0.01, dtype=BF16)
    scale, bias = torch.tensor(10.0), torch.tensor(-10.0)

    def call():
        sigmoid_contrastive(x, y, scale, bias, weight=1 / n, workspace_bytes=workspace(n, n, dim))

    return call


def siglip_kernel(dim: int, n: int):
    x, y = leaves((n, dim), (n, dim))
    temperature, bias = (torch.tensor(v, requires_grad=True) for v in (2.3, -10.0))

    def call():
        # It asks for the device when it is imported.
        from siglip_kernel import fused_chunked_bf16, fused_siglip_loss

        # What is executed is small enough for one chunk, whatever the device.
        pick = fused_chunked_bf16._pick_chunk_size
        chunks = {"_pick_chunk_size": lambda n: n if n <= 4096 else pick(n)}
        with mock.patch.multiple(fused_chunked_bf16, **chunks):
            loss = fused_siglip_loss(x, y, temperature, bias, backend="chunked_bf16")
            gradient(loss, x, y, temperature, bias)

    return call


def eager_sigmoid(dim: int, n: int):
    x, y = leaves((n, dim), (n, dim))
    scale, bias = (torch.tensor(v, requires_grad=True) for v in (10.0, -10.0))

    def call():
        with torch.autocast("cpu", BF16):
            logits = scale * x @ y.T + bias
            signs = 2 * torch.eye(n, dtype=logits.dtype) - 1
            loss = -F.logsigmoid(signs * logits).sum() / n
        gradient(loss, x, y, scale, bias)

    return call


def sigmoid(n: int, dim: int = 512) -> Case:
    implementations = [
        ModelledImplementation("fastvlp", partial(our_sigmoid, dim), EXECUTED),
        ModelledImplementation(
            # Its blocks have 2,048 columns from 512 pairs on: one of them, and two.
            "siglip-kernel",
            partial(siglip_kernel, dim),
            (2048, 4096),
            needs="siglip_kernel",
        ),
        ModelledImplementation(
            "open_clip's formula, autocast", partial(eager_sigmoid, dim), eager=True
        ),
    ]
    return Case(
        "sigmoid", {"n": n, "d": dim}, n, implementations,
        matmuls(3, n, n, dim, 4 * 2 * n * dim),
        "3 matmuls: the logits and two gradients, and the features and gradients once",
        missing=(("siglip-kernel's other backends", "their autotuner times kernels on a GPU"),),
    )  # fmt: skip
