"""Layer norm with the linear layer that follows it, and the feed-forward part, kept small.

    norm_linear:   W LN(x) + b
    feed_forward:  W_2 dropout(f(W_1 LN(x) + b_1)) + b_2     with or without the layer norm

Source: the transformer block of Vaswani et al., "Attention is all you need", arXiv 1706.03762,
section 3.3, in the pre-norm form of Dosovitskiy et al., arXiv 2010.11929. Keeping only what is
dear to compute again follows Korthikanti et al., "Reducing Activation Recomputation in Large
Transformer Models", arXiv 2205.05198, section 5.

What autograd would keep of a block is 16 widths a token: input and output of both norms, q, k, v,
the attention's output, and 4 + 4 widths around the activation. The outputs of a norm and of the
activation cost little to make again. Without them 10 widths are left, and the backward pass takes
one more norm and activation, about 1 % of the block's time. Of dropout one byte a value is kept.
"""

from collections.abc import Callable
from contextlib import nullcontext
from numbers import Real
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlp._autograd import Function
from fastvlp.nn.dropout import apply_mask, draw_dropout
from fastvlp.ops.autocast import as_autocast, autocasts
from fastvlp.ops.checks import check_tensor
from fastvlp.ops.matmul.api import unchecked_matmul


def quick_gelu(x: Tensor) -> Tensor:
    """x · sigmoid(1.702 x), the approximation of GELU in all of OpenAI's CLIP weights."""
    return x * torch.sigmoid(1.702 * x)


def _gelu_backward(gradient: Tensor, x: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # which plans memory itself
        return torch.ops.aten.gelu_backward(gradient, x)
    return torch.ops.aten.gelu_backward.grad_input(gradient, x, grad_input=gradient)


def _quick_gelu_backward(gradient: Tensor, x: Tensor) -> Tensor:
    s = torch.sigmoid(1.702 * x)
    return gradient * (s * (1 + 1.702 * x * (1 - s)))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "quick_gelu": quick_gelu}
# Of a gradient that nobody else reads: it may be overwritten.
_BACKWARD = {"gelu": _gelu_backward, "quick_gelu": _quick_gelu_backward}


class Norm(NamedTuple):
    """The parameters of a layer norm over the last axis: [width] each, and its epsilon."""

    weight: Tensor
    bias: Tensor
    eps: float

    @classmethod
    def of(cls, module: nn.LayerNorm) -> "Norm":
        """The parameters of a module."""
        return cls(module.weight, module.bias, module.eps)


def norm_linear(x: Tensor, norm: Norm, weight: Tensor, bias: Tensor) -> Tensor:
    """F.linear(LN(x), weight, bias), which keeps x and not LN(x) for the backward pass.

    Args:
        x: [.., width], any floating dtype; the norm is computed in float32 at least.
        norm: of the last axis.
        weight, bias: [out, width] and [out].

    Returns:
        [.., out] in the dtype of the weight; under autocast in autocast's. Differentiable once.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """
    _check_input(x)
    _check_norm(norm, x)
    _check_linear("weight", weight, "bias", bias, x.shape[-1])
    weight, bias = as_autocast(weight, bias)
    return _NormLinear.apply(x, norm.weight, norm.bias, weight, bias, norm.eps)


def feed_forward(
    x: Tensor,
    norm: Norm | None,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    activation: str = "gelu",
    dropout_p: float = 0.0,
) -> Tensor:
    """W_2 dropout(f(W_1 LN(x) + b_1)) + b_2, which keeps x and the inner matmul's result for the
    backward.

    Args:
        x: [.., width], any floating dtype; the norm is computed in float32 at least.
        norm: of the last axis, or None for none.
        weight1, bias1: [hidden, width] and [hidden].
        weight2, bias2: [out, hidden] and [out].
        activation: "gelu", the exact one, or "quick_gelu".
        dropout_p: probability with which a value of the activation is dropped.

    Returns:
        [.., out] in the dtype of the weights; under autocast in autocast's. Differentiable once.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {sorted(ACTIVATIONS)}, got {activation!r}")
    if not isinstance(dropout_p, Real) or not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p: expected a probability, got {dropout_p!r}")
    _check_input(x)
    if norm is not None:
        _check_norm(norm, x)
    _check_linear("weight1", weight1, "bias1", bias1, x.shape[-1])
    _check_linear("weight2", weight2, "bias2", bias2, len(weight1))
    weight1, bias1, weight2, bias2 = as_autocast(weight1, bias1, weight2, bias2)
    gain, shift, eps = (None, None, 0.0) if norm is None else norm
    return _FeedForward.apply(
        x, gain, shift, weight1, bias1, weight2, bias2, eps, activation, dropout_p
    )


def _check_input(x) -> None:
    check_tensor("x", x)
    if x.dim() == 0:
        raise ValueError("x: expected [.., width], got shape ()")


def _check_norm(norm, x: Tensor) -> None:
    if not isinstance(norm, Norm):
        raise TypeError(f"norm: expected a Norm, as Norm.of makes it, got {type(norm).__name__}")
    for name, t in (("norm.weight", norm.weight), ("norm.bias", norm.bias)):
        check_tensor(name, t)
        if t.shape != x.shape[-1:]:
            raise ValueError(f"{name}: expected {tuple(x.shape[-1:])}, got {tuple(t.shape)}")


def _check_linear(weight_name: str, weight, bias_name: str, bias, width: int) -> None:
    check_tensor(weight_name, weight, dims=2)
    if bias is not None:
        check_tensor(bias_name, bias)
    if weight.shape[1] != width:
        raise ValueError(f"{weight_name}: expected [out, {width}], got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{bias_name}: expected {tuple(weight.shape[:1])}, got {tuple(bias.shape)}"
        )


def _normed(x, gain, shift, eps, dtype):
    """LN(x) in the dtype of the matmul to come, and the statistics for its backward."""
    if gain is None:
        return x.to(dtype), None, None
    wide = _wide(x)
    y, mean, rstd = torch.native_layer_norm(
        wide, x.shape[-1:], gain.to(wide.dtype), shift.to(wide.dtype), eps
    )
    return y.to(dtype), mean, rstd


def _wide(x):
    return x if x.dtype == torch.float64 else x.float()


def _norm_backward(gradient, x, gain, shift, mean, rstd):
    """Gradients with respect to x, gain and shift, in their dtypes."""
    if gain is None:
        return gradient.to(x.dtype), None, None
    wide = _wide(x)
    dx, dgain, dshift = torch.ops.aten.native_layer_norm_backward(
        gradient.to(wide.dtype), wide, x.shape[-1:], mean, rstd, gain.to(wide.dtype),
        shift.to(wide.dtype), [True, True, True],
    )  # fmt: skip
    return dx.to(x.dtype), dgain.to(gain.dtype), dshift.to(shift.dtype)


def _matmul(x, b, bias=None):
    """x [.., k] @ b [k, n] + bias"""
    return unchecked_matmul(x.reshape(-1, x.shape[-1]), b, bias).view(*x.shape[:-1], b.shape[1])


def _parameter_gradients(gradient, x, wanted):
    """Gradients of F.linear by its weight and bias, those that are wanted."""
    rows = gradient.reshape(-1, gradient.shape[-1])
    dweight = unchecked_matmul(rows.T, x.reshape(-1, x.shape[-1])) if wanted[0] else None
    return dweight, rows.sum(0) if wanted[1] else None


def _plain(x):
    device = x.device.type
    return torch.autocast(device, enabled=False) if autocasts(device) else nullcontext()


class _Once(Function):
    """compute(*tensors) inside of a backward pass, whose own derivative is refused."""

    @staticmethod
    def forward(ctx, compute, *tensors):
        return compute(*tensors)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "norm_linear and feed_forward have no second derivative; for one, use the plain layers "
            "(a model's use_reference())"
        )


def _once(compute, *tensors):
    # The compiler takes no Function inside the backward of another, and no second derivative.
    if torch.compiler.is_compiling():
        return compute(*tensors)
    return _Once.apply(compute, *tensors)


class _NormLinear(Function):
    @staticmethod
    def forward(ctx, x, gain, shift, weight, bias, eps):
        with _plain(x):
            y, mean, rstd = _normed(x, gain, shift, eps, weight.dtype)
            ctx.save_for_backward(x, gain, shift, weight, mean, rstd)
            ctx.eps = eps
            return _matmul(y, weight.T, bias)

    @staticmethod
    def backward(ctx, gradient):
        eps, wanted = ctx.eps, ctx.needs_input_grad

        def compute(gradient, x, gain, shift, weight, mean, rstd):
            y, _, _ = _normed(x, gain, shift, eps, weight.dtype)
            parameters = _parameter_gradients(gradient, y, wanted[3:5])
            dnorm = _norm_backward(_matmul(gradient, weight), x, gain, shift, mean, rstd)
            return *dnorm, *parameters

        return *_once(compute, gradient, *ctx.saved_tensors), None


class _FeedForward(Function):
    @staticmethod
    def forward(ctx, x, gain, shift, weight1, bias1, weight2, bias2, eps, activation, dropout_p):
        with _plain(x):
            y, mean, rstd = _normed(x, gain, shift, eps, weight1.dtype)
            inner = _matmul(y, weight1.T, bias1)
            activated, keep, factor = ACTIVATIONS[activation](inner), None, 1.0
            if dropout_p:
                activated, keep, factor = draw_dropout(activated, dropout_p)
            ctx.save_for_backward(x, gain, shift, weight1, weight2, mean, rstd, inner, keep)
            ctx.eps, ctx.activation, ctx.factor = eps, activation, factor
            return _matmul(activated, weight2.T, bias2)

    @staticmethod
    def backward(ctx, gradient):
        eps, activation, factor = ctx.eps, ctx.activation, ctx.factor
        wanted = ctx.needs_input_grad

        def compute(gradient, x, gain, shift, weight1, weight2, mean, rstd, inner, keep):
            def dropped(values):
                return values if keep is None else apply_mask(values, keep, factor)

            activated = dropped(ACTIVATIONS[activation](inner))
            outer = _parameter_gradients(gradient, activated, wanted[5:7])
            del activated  # before the next tensor of its size is made
            dactivated = dropped(_matmul(gradient, weight2))
            dinner = _BACKWARD[activation](dactivated, inner)
            del dactivated
            y, _, _ = _normed(x, gain, shift, eps, weight1.dtype)
            first = _parameter_gradients(dinner, y, wanted[3:5])
            dnorm = _norm_backward(_matmul(dinner, weight1), x, gain, shift, mean, rstd)
            return *dnorm, *first, *outer

        return *_once(compute, gradient, *ctx.saved_tensors), None, None, None
