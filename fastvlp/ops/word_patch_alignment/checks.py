"""Checks of the word-patch alignment's arguments, for people, and what can run them."""

import math
from numbers import Real
from typing import Any

import torch

from ...kernels import alignment_supported
from .._core import backends
from .._core.checks import check_same_kind

# Room for exp(-C / beta), C at most 2, several times over in the range of the dtype that it is in.
SMALLEST_BETA = {torch.float32: 0.04, torch.float64: 0.005}


def check_inputs(text, image, text_padding, image_padding, beta, iterations, inner) -> None:
    """Raises TypeError or ValueError unless all arguments are as `word_patch_alignment` says."""
    for name, t in (("text_features", text), ("image_features", image)):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
        if not t.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point dtype, got {t.dtype}")
        if t.dim() != 3 or t.shape[2] == 0:
            raise ValueError(
                f"{name}: expected shape [B, L, D] with D of at least 1, got {tuple(t.shape)}"
            )
    if text.shape[0] != image.shape[0] or text.shape[2] != image.shape[2]:
        raise ValueError(
            "image_features: expected the number of pairs and the width of text_features "
            f"{tuple(text.shape)}, got {tuple(image.shape)}"
        )
    check_same_kind("image_features", image, "text_features", text)
    _check_padding("text_padding", text_padding, text)
    _check_padding("image_padding", image_padding, image)
    _check_numbers(beta, iterations, inner, text.dtype)


def _check_padding(name: str, padding, features: torch.Tensor) -> None:
    if not isinstance(padding, torch.Tensor) or padding.dtype != torch.bool:
        got = getattr(padding, "dtype", type(padding).__name__)
        raise TypeError(f"{name}: expected a bool tensor, True at padding, got {got}")
    if padding.shape != features.shape[:2]:
        raise ValueError(
            f"{name}: expected one value per position of the features, "
            f"{tuple(features.shape[:2])}, got {tuple(padding.shape)}"
        )
    if padding.device != features.device:
        raise ValueError(
            f"{name}: expected the features' device, {features.device}, got {padding.device}; "
            "move it"
        )


def _check_numbers(beta, iterations, inner, dtype: torch.dtype) -> None:
    for name, value in (("iterations", iterations), ("inner_iterations", inner)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")
    if not isinstance(beta, Real):
        raise TypeError(f"beta: expected a number, got {type(beta).__name__}")
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    if not SMALLEST_BETA[computed] <= beta < math.inf:
        raise ValueError(
            f"beta: expected a finite number of at least {SMALLEST_BETA[torch.float32]} (float64 "
            f"features: {SMALLEST_BETA[torch.float64]}), got {beta!r}; with a smaller one "
            f"exp(-C / beta) leaves the range of {str(computed).removeprefix('torch.')}"
        )


def triton_reasons(text_features, image_features, *_, **__) -> list[str]:
    """Why the Triton kernels cannot take these features."""
    return backends.triton_reasons(alignment_supported, text_features, image_features)


# The backends in order of preference.
CANDIDATES: dict[str, Any] = {
    "triton": triton_reasons,
    "native": backends.native_reasons,
    "reference": backends.reference_reasons,
}
