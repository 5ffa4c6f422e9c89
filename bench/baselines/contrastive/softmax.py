"""What itc_throughput.py compares: implementations of the symmetric contrastive loss.

Every one of them gives the loss and the gradients to both towers and to the logit scale.
They do not all run one race, so every row says two things of its implementation: `logits`, the
precision to which logits are rounded before the softmax (at s = 100 a bfloat16 logit is off
by up to 0.25), and `softmax`, that of the softmax itself.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from _harness.measure import BOUND, DTYPES, OURS, Implementation, Missing
from _harness.timing import CpuClock, CudaClock
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
# What the error of a row is taken over; the scale's gradient is recorded as well.
JUDGED = ("loss", "d_image", "d_text")


@dataclass(frozen=True)
class Inputs:
    """image, text: [N, D] of one dtype; scale: float32 scalar, already exponentiated."""

    image: Tensor
    text: Tensor
    scale: Tensor


def forward(make_loss: Callable[[], Loss], inputs: Inputs) -> Callable[[], dict]:
    """A call that computes the loss alone."""
    loss = make_loss()

    @torch.no_grad()
    def call() -> dict[str, Tensor]:
        return {"loss": loss(inputs.image, inputs.text, inputs.scale)}

    return call


def forward_backward(make_loss: Callable[[], Loss], inputs: Inputs) -> Callable[[], dict]:
    """A call that computes loss and gradients on fresh leaves over the same storage."""
    loss = make_loss()
    leaves = [
        tensor.detach().requires_grad_() for tensor in (inputs.image, inputs.text, inputs.scale)
    ]

    def call() -> dict[str, Tensor]:
        value = loss(*leaves)
        d_image, d_text, d_scale = torch.autograd.grad(value, leaves)
        return {"loss": value.detach(), "d_image": d_image, "d_text": d_text, "d_scale": d_scale}

    return call


def fixed_scale(make_loss: Callable[[float], Loss], inputs: Inputs) -> Callable[[], dict]:
    """As `forward_backward`, for a loss that takes its scale as a number.

    The gradient to the scale, which such a loss leaves out, follows from
    ds = ⟨image, d_image⟩ / s and is computed inside the timed call.
    """
    scale = float(inputs.scale)
    loss = make_loss(scale)
    leaves = [tensor.detach().requires_grad_() for tensor in (inputs.image, inputs.text)]

    def call() -> dict[str, Tensor]:
        value = loss(*leaves, inputs.scale)
        d_image, d_text = torch.autograd.grad(value, leaves)
        d_scale = torch.linalg.vecdot(leaves[0].detach().float(), d_image.float()).sum() / scale
        return {"loss": value.detach(), "d_image": d_image, "d_text": d_text, "d_scale": d_scale}

    return call


def ours() -> Loss:
    from fastvlp.losses import ClipLoss

    return ClipLoss()


def has_open_clip() -> bool:
    return importlib.util.find_spec("open_clip") is not None


def eager() -> Loss:
    """open_clip's ClipLoss, or where that is not installed the same formula in plain PyTorch."""
    return open_clip_loss().ClipLoss() if has_open_clip() else plain


def open_clip_loss() -> ModuleType:
    """The module open_clip.loss without the rest of the package, whose models take seconds to
    import."""
    name = "open_clip.loss"
    folder = importlib.util.find_spec("open_clip").submodule_search_locations[0]
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(folder) / "loss.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def plain(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    logits = scale * image @ text.T
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def autocast(dtype: torch.dtype, device: str) -> Loss:
    """How open_clip trains under --precision amp: low-precision logits, fp32 cross-entropy."""
    loss = eager()

    def call(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        with torch.autocast(device, dtype):
            return loss(image, text, scale)

    return call


def compiled(make_loss: Callable[[], Loss]) -> Loss:
    # It looks for a GPU each time it is loaded, and warns each time that there is none.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    # Every N is compiled for its exact shape; past the limit torch would quietly run eagerly.
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(make_loss(), dynamic=False)


def chunked(accumulate: torch.dtype | None) -> Loss:
    """Two `F.linear_cross_entropy`, chunked; accumulate None: the call's own choice.

    On a CPU chunks of N/4 rows were the fastest of 256 rows to all of them, and "compact"
    the faster policy (torch 2.15, N = 8192, D = 512).
    """

    def call(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        labels = torch.arange(len(image), device=image.device)
        if image.device.type == "cpu":
            options = torch.nn.LinearCrossEntropyOptions(
                batch_chunk_size=max(512, len(image) // 4),
                acc_policy="compact",
                acc_dtype=accumulate,
            )
        else:
            options = torch.nn.LinearCrossEntropyOptions(acc_dtype=accumulate)
        one_way = functools.partial(F.linear_cross_entropy, target=labels, options=options)
        return (one_way(scale * image, text) + one_way(scale * text, image)) / 2

    return call


def infcl() -> Loss:
    # Its single-device part: the other one sums gradients over a process group that must exist.
    from inf_cl import cal_flash_loss

    def call(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        one_way = functools.partial(cal_flash_loss, scale=scale)
        return (one_way(image, text).mean() + one_way(text, image).mean()) / 2

    return call


def transformers_clip() -> Loss:
    """The loss of transformers' CLIPModel."""
    from transformers.models.clip.modeling_clip import contrastive_loss

    def call(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        logits = scale * text @ image.T
        return (contrastive_loss(logits) + contrastive_loss(logits.T)) / 2

    return call


def memeff(scale: float) -> Loss:
    from memeff import MemoryEfficientCLIPLoss

    # stable=True would return another gradient scale than the loss's.
    loss = MemoryEfficientCLIPLoss(temperature=1 / scale, normalized_inputs=True, stable=False)
    return lambda image, text, _scale: loss(image, text)


def implementations(
    dtype: str, device: str, our_loss: Callable[[], Loss] = ours
) -> tuple[list[Implementation], list[Missing]]:
    """Ours, the bounds and every peer that can run here; and those that cannot, with reasons."""
    low = DTYPES[dtype] != torch.float32
    base = "open_clip" if has_open_clip() else "eager"
    found = [
        _implementation(OURS, our_loss, "fp32", "fp32"),
        Implementation(
            BOUND,
            functools.partial(matmuls, 2),
            bound=True,
            note="torch.mm for 4 matmuls alone: logits, logits again for the backward pass, and "
            "the two gradients",
            extra={"matmuls": 4},
        ),
        Implementation(
            BOUND + "3",
            functools.partial(matmuls, 1),
            bound=True,
            note="torch.mm for 3 matmuls alone: the logits, kept for the backward pass, and the "
            "two gradients",
            extra={"matmuls": 3},
        ),
    ]
    precise = functools.partial(autocast, DTYPES[dtype], device) if low else eager
    precise_name = f"{base} autocast" if low else base
    found.append(_implementation(precise_name, precise, dtype, "fp32"))
    found.append(_implementation(f"{precise_name} compiled", precise, dtype, "fp32", compile_=True))
    if low:
        found.append(_implementation(f"{base} {dtype}", eager, dtype, dtype))
        found.append(
            _implementation(f"{base} {dtype} compiled", eager, dtype, dtype, compile_=True)
        )
    missing = (
        []
        if has_open_clip()
        else [
            Missing(
                "open_clip",
                "not installed, the same formula runs as 'eager'",
                "pip install -e '.[bench]'",
            )
        ]
    )
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        wide = functools.partial(chunked, torch.float32 if low else None)
        found.append(_implementation("linear_cross_entropy", wide, "fp32", "fp32"))
        if low:
            narrow = functools.partial(chunked, DTYPES[dtype])
            found.append(_implementation(f"linear_cross_entropy {dtype}", narrow, dtype, dtype))
    else:
        missing.append(
            Missing(
                "linear_cross_entropy",
                f"torch {torch.__version__} has no chunked F.linear_cross_entropy",
                "pip install -U torch",
            )
        )
    for implementation, absence in _gpu_peers(device):
        found.extend(implementation)
        missing.extend(absence)
    return found, missing


def _implementation(
    name: str, make_loss: Callable[[], Loss], logits: str, softmax: str, compile_: bool = False
) -> Implementation:
    if compile_:
        make_loss = functools.partial(compiled, make_loss)
    return Implementation(
        name,
        functools.partial(forward_backward, make_loss),
        compiled=compile_,
        extra={"logits": logits, "softmax": softmax},
    )


def _gpu_peers(device: str) -> Iterator[tuple[list[Implementation], list[Missing]]]:
    peers = {
        "inf-cl": ("inf_cl", functools.partial(forward_backward, infcl)),
        "memeff": ("memeff", functools.partial(fixed_scale, memeff)),
    }
    for name, (module, make) in peers.items():
        if device != "cuda":
            yield [], [Missing(name, "runs on a GPU only", "--device cuda")]
        elif importlib.util.find_spec(module) is None:
            yield [], [Missing(name, "not installed", f"pip install {name}")]
        else:
            yield [Implementation(name, make, extra={"logits": "fp32", "softmax": "fp32"})], []


def matmuls(logit_matmuls: int, inputs: Inputs) -> Callable[[], None]:
    """The matmuls that no implementation of the loss can do without.

    `logit_matmuls` times image·textᵀ (1: the exponentials are kept for backward; 2: they
    are computed again), then g·text and gᵀ·image. Each is done by torch.mm in the row
    blocks, reused as a fused kernel would, that are fastest here.
    """
    best = fastest_blocks(
        len(inputs.image), inputs.image.shape[1], inputs.image.dtype, inputs.image.device.type
    )
    logits, d_image, d_text = (_matmul(kind, inputs, rows) for kind, rows in best.items())

    def call() -> None:
        for _ in range(logit_matmuls):
            logits()
        d_image()
        d_text()

    return call


@functools.lru_cache(maxsize=32)
def fastest_blocks(n: int, d: int, dtype: torch.dtype, device: str) -> dict[str, int]:
    """The fastest of a few block heights for each of the three matmuls."""
    image, text = torch.randn(2, n, d, device=device).to(dtype)
    inputs = Inputs(image, text, torch.ones((), device=device))
    # A whole N x N result only while it is small compared with a machine's memory.
    heights = sorted({min(n, rows) for rows in (256, 512, 2048, 8192)})
    clock = CudaClock() if device == "cuda" else CpuClock()
    best = {}
    for kind in ("logits", "d_image", "d_text"):
        calls = {rows: _matmul(kind, inputs, rows) for rows in heights}
        times = {rows: min(clock(calls[rows]) for _ in range(3)) for rows in heights}
        best[kind] = min(times, key=times.get)
    return best


def _matmul(kind: str, inputs: Inputs, rows: int) -> Callable[[], None]:
    image, text = inputs.image, inputs.text
    n = len(image)
    blocks = [slice(start, min(start + rows, n)) for start in range(0, n, rows)]
    # Not zeros: a CPU that switches fewer bits may clock higher.
    tile = torch.randn(rows, n, device=image.device).to(image.dtype)
    gradient = torch.empty_like(image)

    def call() -> None:
        for block in blocks:
            part = tile[: block.stop - block.start]
            if kind == "logits":
                torch.mm(image[block], text.T, out=part)
            elif kind == "d_image":
                torch.mm(part, text, out=gradient[block])
            else:
                torch.mm(part.T, image[block], out=gradient)

    return call


def float64_reference(inputs: Inputs, rows: int = 512) -> Mapping[str, Tensor]:
    """Loss and gradients in float64 from the inputs as they are, in row blocks."""
    image, text = inputs.image.double(), inputs.text.double()
    scale, n = inputs.scale.double(), len(inputs.image)
    starts = range(0, n, rows)
    row_lse, columns = [], None
    for start in starts:
        logits = scale * image[start : start + rows] @ text.T
        row_lse.append(logits.logsumexp(1))
        block = logits.logsumexp(0)
        columns = block if columns is None else torch.logaddexp(columns, block)
    diagonal = scale * (image * text).sum(1)
    loss = (torch.cat(row_lse) + columns - 2 * diagonal).sum() / (2 * n)
    d_image, d_text = torch.empty_like(image), torch.zeros_like(text)
    for start, lse in zip(starts, row_lse, strict=True):
        block = slice(start, start + rows)
        logits = scale * image[block] @ text.T
        slope = (logits - lse[:, None]).exp_() + (logits - columns).exp_()
        slope.diagonal(start).sub_(2)
        slope *= scale / (2 * n)
        d_image[block] = slope @ text
        d_text += slope.T @ image[block]
    d_scale = (image * d_image).sum() / scale
    return {"loss": loss, "d_image": d_image, "d_text": d_text, "d_scale": d_scale}
