"""Why a backend cannot run, in the same words for every operator."""

from collections.abc import Callable, Iterable

import torch

from ... import kernels
from .. import compiled

NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def native_reasons(tensor: torch.Tensor, *_, **__) -> list[str]:
    """Why the compiled CPU kernels cannot take tensors of this one's device and dtype."""
    return _compiled_reasons(tensor, "the CPU")


def native_or_cuda_reasons(
    tensor: torch.Tensor, cuda_reasons: Callable[[int], Iterable[str]]
) -> list[str]:
    """The same of an operator that has compiled kernels for CUDA devices, too."""
    if tensor.device.type == "cuda":
        return [*cuda_reasons(tensor.device.index), *dtype_reasons(tensor)]
    return _compiled_reasons(tensor, "CPU and CUDA devices")


def _compiled_reasons(tensor: torch.Tensor, devices: str) -> list[str]:
    reasons = list(compiled.load())
    if tensor.device.type != "cpu":
        reasons.append(f"the native kernels run on {devices}, the tensors are on {tensor.device}")
    return reasons + dtype_reasons(tensor)


def dtype_reasons(tensor: torch.Tensor) -> list[str]:
    """Why no kernel takes tensors of this dtype."""
    if tensor.dtype in NATIVE_DTYPES:
        return []
    return [f"dtype {tensor.dtype} has no kernel; float32, bfloat16, float16 have"]


def triton_reasons(supported: Callable[..., list[str]], *tensors: torch.Tensor) -> list[str]:
    """Why the Triton kernels cannot take these tensors, all on one device.

    `supported` says so of tensors on a CUDA device whose last axis is contiguous, as it is made
    before any kernel runs.
    """
    reasons = list(compiled.missing_schemas())
    device = tensors[0].device
    if device.type != "cuda":
        return [*reasons, f"the Triton kernels run on CUDA devices, the tensors are on {device}"]
    return reasons + supported(*(unit_stride(t) for t in tensors))


def pair_triton_reasons(
    image_features: torch.Tensor, text_features: torch.Tensor, *_, **__
) -> list[str]:
    """Why the Triton kernels of a loss of pairs of features cannot take these."""
    return triton_reasons(kernels.supported, image_features, text_features)


def native_on_cpu(tensor: torch.Tensor, *_, **__) -> str | None:
    """The backend to ask first: on a CPU the compiled kernels, at the cost of asking no other."""
    return "native" if tensor.device.type == "cpu" else None


def reference_reasons(*_, **__) -> list[str]:
    """The reference runs everywhere."""
    return []


def unit_stride(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, copied only where its last axis is not contiguous."""
    if tensor.shape[-1] == 1 or tensor.stride(-1) == 1:
        return tensor
    # Not contiguous(), to which every tensor without elements is so already.
    return tensor.clone(memory_format=torch.contiguous_format)
