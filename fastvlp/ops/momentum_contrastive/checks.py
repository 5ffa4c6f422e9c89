"""Checks of momentum_contrastive's arguments, for people."""

from numbers import Integral
from typing import Any, NamedTuple

import torch

from .._core import backends
from .._core.backends import unit_stride
from .._core.checks import as_scalar, check_features, check_share, readable

# float32: what stands for an excluded key has to stay below any logit and above -infinity.
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 1e-36, 1e36


CANDIDATES: dict[str, Any] = {
    "triton": backends.pair_triton_reasons,
    "native": backends.native_reasons,
    "reference": backends.reference_reasons,
}


class Inputs(NamedTuple):
    """Checked arguments. `teacher` is False where alpha is the number 0."""

    features: tuple[torch.Tensor, ...]
    temperature: torch.Tensor
    alpha: torch.Tensor
    ids: torch.Tensor | None
    queue_ids: torch.Tensor | None
    queue_length: torch.Tensor
    seed: torch.Tensor
    teacher: bool

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """The arguments of the reference, in order."""
        return (*self.features, *self[1:7])


def prepare(
    image_features, text_features, image_momentum, text_momentum, image_queue, text_queue,
    temperature, alpha, ids, queue_ids, queue_length, seed,
) -> Inputs:  # fmt: skip
    """Raises TypeError or ValueError, naming the argument, unless all is as documented."""
    check_features(image_features, text_features)
    like = image_features
    for name, t, rows in (
        ("image_momentum", image_momentum, len(like)),
        ("text_momentum", text_momentum, len(like)),
        ("image_queue", image_queue, None),
        ("text_queue", text_queue, None),
    ):
        _check_keys(name, t, like, rows)
    if image_queue.shape != text_queue.shape:
        raise ValueError(
            f"text_queue: expected the shape of image_queue, {tuple(image_queue.shape)}, got "
            f"{tuple(text_queue.shape)}; row k of both belongs to one pair"
        )
    _check_ids(ids, queue_ids, image_queue, like)
    tensors = (image_features, text_features, image_momentum, text_momentum, image_queue)
    return Inputs(
        tuple(unit_stride(t) for t in (*tensors, text_queue)),
        _temperature(temperature, like),
        _alpha(alpha, like),
        None if ids is None else ids.contiguous(),
        None if ids is None else queue_ids.contiguous(),
        _queue_length(queue_length, image_queue),
        _seed(seed, like),
        isinstance(alpha, torch.Tensor) or alpha != 0,
    )


def _check_keys(name: str, t, like: torch.Tensor, rows: int | None) -> None:
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
    if t.dim() != 2 or t.shape[1] != like.shape[1] or rows not in (None, t.shape[0]):
        expected = "Q" if rows is None else rows
        raise ValueError(
            f"{name}: expected shape [{expected}, {like.shape[1]}] to match image_features, got "
            f"{tuple(t.shape)}"
        )
    if t.dtype != like.dtype:
        raise TypeError(
            f"{name}: expected the dtype of image_features, {like.dtype}, got {t.dtype}; cast "
            "the student's features (which keeps their gradient), or keep the queue in their dtype"
        )
    if t.device != like.device:
        raise ValueError(
            f"{name}: expected the device of image_features, {like.device}, got {t.device}; move it"
        )
    _check_no_gradient(name, t)


def _check_no_gradient(name: str, t: torch.Tensor) -> None:
    if t.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: expected a tensor that needs no gradient: none flows there; compute it under "
            "torch.no_grad() or pass .detach()"
        )


def _check_ids(ids, queue_ids, queue: torch.Tensor, like: torch.Tensor) -> None:
    if ids is None:
        if queue_ids is not None:
            raise ValueError("queue_ids: given without ids, the ids of the batch; give both")
        return
    if queue_ids is None:
        raise ValueError("queue_ids: expected one id per queue row together with ids, got None")
    for name, t, rows in (("ids", ids, len(like)), ("queue_ids", queue_ids, len(queue))):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
        if t.dtype != torch.int64:
            raise TypeError(f"{name}: expected torch.int64, got {t.dtype}; call .long()")
        if t.shape != (rows,):
            raise ValueError(f"{name}: expected shape [{rows}], got {tuple(t.shape)}")
        if t.device != like.device:
            raise ValueError(
                f"{name}: expected the features' device, {like.device}, got {t.device}; move it"
            )


def _temperature(value, like: torch.Tensor) -> torch.Tensor:
    t = as_scalar("temperature", value, like)
    if not readable(t):
        return t
    number = t.item()
    if number <= 0:
        raise ValueError(f"temperature: expected a value above 0, got {number}; clamp it")
    if t.dtype == torch.float32 and not LOWEST_TEMPERATURE <= number <= HIGHEST_TEMPERATURE:
        raise ValueError(
            f"temperature: expected {LOWEST_TEMPERATURE} to {HIGHEST_TEMPERATURE}, beyond which "
            f"logits leave the range of float32, got {number}; clamp it"
        )
    return t


def _alpha(value, like: torch.Tensor) -> torch.Tensor:
    alpha = as_scalar("alpha", value, like)
    _check_no_gradient("alpha", alpha)
    check_share("alpha", alpha)
    return alpha


def _integer(name: str, value, like: torch.Tensor) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        if value.numel() != 1 or value.dtype != torch.int64:
            raise TypeError(
                f"{name}: expected one int64 value, got {value.dtype} of shape {tuple(value.shape)}"
            )
        if value.device != like.device:
            raise ValueError(
                f"{name}: expected the features' device, {like.device}, got {value.device}; move it"
            )
        return value.reshape(())
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected a whole number, got {type(value).__name__}")
    return torch.full((), int(value), dtype=torch.int64, device=like.device)


def _queue_length(value, queue: torch.Tensor) -> torch.Tensor:
    length = _integer("queue_length", len(queue) if value is None else value, queue)
    if value is not None and readable(length) and not 0 <= length.item() <= len(queue):
        raise ValueError(
            f"queue_length: expected 0 to the queue's {len(queue)} rows, got {length.item()}"
        )
    return length


def _seed(value, like: torch.Tensor) -> torch.Tensor:
    if value is None:
        return torch.randint(2**62, (), dtype=torch.int64, device=like.device)
    if isinstance(value, Integral) and not -(2**63) <= value < 2**63:
        raise ValueError(f"seed: expected a number of 64 bits, got {value}")
    return _integer("seed", value, like)
