"""A step of AdamW, the momentum update by its result and copies of both, in one pass."""

from collections.abc import Sequence

import torch

from .._core.dispatch import choose, register_backends
from . import multi_tensor
from .api import ema_reference
from .memory import without_ties

Tensors = Sequence[torch.Tensor]


@torch.no_grad()
def adamw_ema(
    weights: Tensors,
    gradients: Tensors,
    first_moments: Tensors,
    second_moments: Tensors,
    momentum: Tensors = (),
    weight_copies: Tensors = (),
    momentum_copies: Tensors = (),
    *,
    step: float,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
    decay: float | torch.Tensor = 0.999,
    nonfinite: torch.Tensor | None = None,
) -> None:
    """Updates weights, moments and momentum in place and writes the copies.

        p <- (1 - lr wd) p;  m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
        p <- p - lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)
        e <- d e + (1 - d) p

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv 1711.05101,
    algorithm 2, as torch.optim.AdamW computes it; the momentum update as in `fastvlp.ops.ema`.

    Cost: 40 bytes of memory traffic for a float32 parameter with a float32 gradient and two
    bfloat16 copies (g 4, p m v e 8 each, copies 2 each), against 52 to 56 for the same work by
    separate passes. Arithmetic is float32 whatever the dtypes. Nothing is differentiable.

    Args:
        weights, gradients, first_moments, second_moments: lists of equal length, float32,
            bfloat16 or float16 each (float64 through the reference), any strides; DTensors are
            updated where they lie.
        momentum, weight_copies, momentum_copies: the same or empty; momentum_copies need momentum.
        step: t, the number of this step, from 1.
        lr, betas, eps, weight_decay, maximize: as in torch.optim.AdamW.
        decay: d of the momentum update, as in `ema`.
        nonfinite: None, or an int64 tensor of one value on the tensors' device, as
            `fastvlp.ops.last_exceeding` gives it: nothing is written unless it is -1.

    Raises:
        TypeError, ValueError, RuntimeError: as `ema` does, before anything is written.

    Examples:
        >>> import torch
        >>> from fastvlp.ops import adamw_ema
        >>> weights, gradients = [torch.ones(2)], [torch.ones(2)]
        >>> moments = [torch.zeros(2)], [torch.zeros(2)]
        >>> adamw_ema(weights, gradients, *moments, step=1, lr=0.5, weight_decay=0.0)
        >>> weights
        [tensor([0.5000, 0.5000])]
    """
    lists = {
        "weights": weights, "gradients": gradients, "first_moments": first_moments,
        "second_moments": second_moments, "momentum": momentum, "weight_copies": weight_copies,
        "momentum_copies": momentum_copies,
    }  # fmt: skip
    lists = {name: list(tensors) for name, tensors in lists.items()}

    multi_tensor.check_lists(lists, optional=("momentum", "weight_copies", "momentum_copies"))
    if lists["momentum_copies"] and not lists["momentum"]:
        raise ValueError("momentum_copies: expected none without momentum")
    if not multi_tensor.checked_number("step", step) >= 1:
        raise ValueError(f"step: expected at least 1, got {step!r}")
    multi_tensor.check_adamw(lr, betas, eps, weight_decay)
    if not lists["weights"]:
        return
    decay_tensor, decay_value = multi_tensor.checked_decay(decay, lists["weights"][0])
    parts = [multi_tensor.local(tensors) for tensors in lists.values()]
    if choose("adamw_ema", *parts) == "native":
        torch.ops.fastvlp.adamw_ema(
            *parts, float(lr), *map(float, betas), float(eps), float(weight_decay), float(step),
            maximize, decay_tensor, decay_value, nonfinite,
        )  # fmt: skip
        multi_tensor.bump_versions(parts[0], *parts[2:])
        return
    if not torch.compiler.is_compiling():
        parts = without_ties(dict(zip(lists, parts, strict=True)), read=("gradients",))
    if nonfinite is None or nonfinite.item() < 0:
        adamw_ema_reference(
            *parts, step=step, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
            maximize=maximize, decay=decay,
        )  # fmt: skip


@torch.no_grad()
def adamw_ema_reference(
    weights: Tensors,
    gradients: Tensors,
    first_moments: Tensors,
    second_moments: Tensors,
    momentum: Tensors = (),
    weight_copies: Tensors = (),
    momentum_copies: Tensors = (),
    *,
    step: float,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
    decay: float | torch.Tensor = 0.999,
) -> None:
    """The definition of `adamw_ema`, for any floating dtype."""
    for p, g, m, v in zip(weights, gradients, first_moments, second_moments, strict=True):
        wide = torch.float64 if p.dtype == torch.float64 else torch.float32
        g = -g.to(wide) if maximize else g.to(wide)
        first = m.to(wide).lerp(g, 1 - betas[0])
        second = v.to(wide) * betas[1] + (1 - betas[1]) * g * g
        denominator = second.sqrt() / (1 - betas[1] ** step) ** 0.5 + eps
        shrunk = p.to(wide) * (1 - lr * weight_decay)
        p.copy_(shrunk - lr / (1 - betas[0] ** step) * first / denominator)
        m.copy_(first)
        v.copy_(second)
    for copy, p in zip(weight_copies, weights, strict=False):
        copy.copy_(p)
    if momentum:
        ema_reference(momentum, weights, decay, momentum_copies)


def _native_reasons(*lists, **_):
    return multi_tensor.native_reasons(*lists[:7])


def _no_reasons(*_, **__):
    return []


register_backends(
    "adamw_ema",
    example=dict.fromkeys(("weights", "gradients", "first_moments", "second_moments"), [(8,)]),
    native=_native_reasons,
    reference=_no_reasons,
)
