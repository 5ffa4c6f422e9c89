"""Which backend the contrastive losses run on, and why not the others."""

from typing import Any

import torch

from .._core import backends
from . import cuda


def native_reasons(
    image_features: torch.Tensor, text_features: torch.Tensor, *_, **__
) -> list[str]:
    """Why the compiled kernels, CPU or CUDA, cannot take these features."""
    return backends.native_or_cuda_reasons(image_features, cuda.unavailable)


# The backends in order of preference. Triton refuses CPU tensors: the compiled kernels come first
# there, and on a GPU second, but for float32.
CANDIDATES: dict[str, Any] = {
    "triton": backends.pair_triton_reasons,
    "native": native_reasons,
    "reference": backends.reference_reasons,
}


def preferred_backend(
    image_features: torch.Tensor, text_features: torch.Tensor, *_, **__
) -> str | None:
    """The compiled passes on a CPU, and for float32 features on a GPU; None for others.

    In float32 a GPU's tensor cores have no part in the GEMM of a tile, and cuBLAS's GEMMs, whose
    results the compiled passes read, come nearer to what the other units can do than those of
    Triton's tiles.
    """
    if image_features.dtype == torch.float32 and image_features.device.type == "cuda":
        return "native"
    return backends.native_on_cpu(image_features)
