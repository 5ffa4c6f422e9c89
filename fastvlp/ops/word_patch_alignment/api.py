"""Word-patch alignment: the optimal-transport distance between the words and patches of a pair."""

import math

import torch
import torch.nn.functional as F

from ..._autograd import Function
from .._core.backends import native_on_cpu, unit_stride
from .._core.checks import check_count, check_tensor, readable
from .._core.dispatch import choose, register_backends
from .._core.implement import without_autocast
from .checks import CANDIDATES, check_inputs
from .register import register_operators

SMALLEST_NORM = 1e-5
LOG_OF_NOTHING = -50.0  # of an entry that changes no distance
PADDING_TERM = 1e4  # keeps the scaling of a padded row finite; its plan is 0 whatever it is


def word_patch_alignment(
    text_features: torch.Tensor,
    image_features: torch.Tensor,
    text_padding: torch.Tensor,
    image_padding: torch.Tensor,
    *,
    beta: float = 0.5,
    iterations: int = 50,
    inner_iterations: int = 1,
    return_plan: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Transport distance between text_features[b] and image_features[b], for every pair b.

        C_ij = 1 - cos(x_i, y_j)                      words i, patches j, padding left out
        T    = 50 proximal point iterations (IPOT) for the cheapest plan between uniform margins:
               Q = exp(-C / beta) * T;  delta_j = 1 / (m sum_i Q_ij sigma_i);
               sigma_i = 1 / (n sum_j Q_ij delta_j);  T = diag(sigma) Q diag(delta)
        distance = sum_ij C_ij T_ij

    with n words and m patches, T = 1 and sigma = 1/n at the start. Source: Kim, Son, Kim, "ViLT:
    Vision-and-Language Transformer Without Convolution or Region Supervision", arXiv 2102.03334,
    section 3.2 and appendix; Xie et al., "A Fast Proximal Point Method for Computing Exact
    Wasserstein Distance", arXiv 1802.04307, algorithm 1.

    The distance is differentiable once w.r.t. the features, through the costs with the plan held
    fixed, as ViLT trains it (at the optimum that is the derivative of the whole); the plan itself
    carries no gradient. Costs and plans are float32 whatever the features are. Entries of a plan
    may leave the range of float32, or of float64, and come back (many iterations, small beta, words
    and patches of few directions): on a CPU and in the reference such a pair is solved again with
    logarithms in place of entries, or is NaN where the reference is compiled. The GPU kernel always
    keeps logarithms, of the scalings, in float32: its plans are right to float32 eps * (1 +
    iterations / beta).

    Cost of a pair with n words, m patches, width D: 2 n m D FLOP forward, 4 n m D backward and
    about 5 n m a iteration, on the valid rows only. Memory beyond results and gradients: the plans,
    4 B Lx Ly bytes, and a few MB for each thread.

    Args:
        text_features: [B, Lx, D], float32, bfloat16 or float16 (float64 through the reference);
            normalised here, rows shorter than 1e-5 divided by that.
        image_features: [B, Ly, D], same dtype and device.
        text_padding: [B, Lx] bool, True where a word takes no part. ViLT leaves out CLS and SEP as
            well; `alignment_padding` makes its masks from lengths.
        image_padding: [B, Ly] bool, the same for patches.
        beta: strength of the proximal term; smaller converges in fewer iterations. At least 0.04,
            below which exp(-C / beta) leaves the range of float32 (0.005 for float64 features).
        iterations: proximal point steps.
        inner_iterations: scalings of delta and sigma in each step.
        return_plan: also return the plans, to look at.

    Returns:
        The distances [B], float32 (float64 for float64 features), 0 for a pair without words or
        without patches; with `return_plan` also T [B, Lx, Ly], 0 at padding. What stands at padded
        positions has no influence, NaN included, and gets a zero gradient.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
        RuntimeError: FASTVLP_BACKEND forces an implementation that cannot run, or a second
            derivative is asked for.

    Examples:
        >>> import torch
        >>> from fastvlp.ops import alignment_padding, word_patch_alignment
        >>> words, patches = torch.randn(2, 8, 16), torch.randn(2, 10, 16)
        >>> lengths = torch.tensor([8, 5]), torch.tensor([10, 10])
        >>> padding = alignment_padding(*lengths, text_size=8, image_size=10)
        >>> word_patch_alignment(words, patches, *padding).shape
        torch.Size([2])
    """
    check_inputs(
        text_features, image_features, text_padding, image_padding,
        beta, iterations, inner_iterations,
    )  # fmt: skip
    if choose("word_patch_alignment", text_features, image_features) == "reference":
        return without_autocast(word_patch_alignment_reference)(
            text_features, image_features, text_padding, image_padding, beta=beta,
            iterations=iterations, inner_iterations=inner_iterations, return_plan=return_plan,
        )  # fmt: skip
    distance, plan = _WordPatchAlignment.apply(
        unit_stride(text_features), unit_stride(image_features), text_padding.contiguous(),
        image_padding.contiguous(), float(beta), iterations, inner_iterations,
    )  # fmt: skip
    return (distance, plan) if return_plan else distance


def word_patch_alignment_reference(
    text_features: torch.Tensor,
    image_features: torch.Tensor,
    text_padding: torch.Tensor,
    image_padding: torch.Tensor,
    *,
    beta: float = 0.5,
    iterations: int = 50,
    inner_iterations: int = 1,
    return_plan: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The definition of `word_patch_alignment`: any device, any floating dtype."""
    sides = []
    for features, padding in ((text_features, text_padding), (image_features, image_padding)):
        kept = features.masked_fill(padding[..., None], 0)  # a NaN there must not spread
        kept = kept if kept.dtype == torch.float64 else kept.float()
        sides.append(F.normalize(kept, dim=-1, eps=SMALLEST_NORM))
    outside = text_padding[:, :, None] | image_padding[:, None, :]
    cost = (1 - sides[0] @ sides[1].mT).masked_fill(outside, 0)
    with torch.no_grad():
        plan = _transport_plan(
            cost, text_padding, image_padding, outside, beta, iterations, inner_iterations
        )
    distance = (cost * plan).sum((1, 2))
    return (distance, plan) if return_plan else distance


def _transport_plan(cost, x_padding, y_padding, outside, beta, iterations, inner_iterations):
    kernel = torch.exp(-cost / beta).masked_fill(outside, 0)
    x_count = (~x_padding).sum(1).to(cost)[:, None, None]
    y_count = (~y_padding).sum(1).to(cost)[:, None, None]
    x_term = PADDING_TERM * x_padding[:, :, None].to(cost)
    y_term = PADDING_TERM * y_padding[:, None, :].to(cost)
    sigma = (1 / x_count).expand(-1, cost.shape[1], 1)
    plan = torch.ones_like(cost)
    smallest, x_log, y_log = plan, 0, 0
    for _ in range(iterations):
        q = kernel * plan
        smallest = torch.minimum(smallest, q)
        for _ in range(inner_iterations):
            delta = 1 / (y_count * (q * sigma).sum(1, keepdim=True) + y_term)
            sigma = 1 / (x_count * (q * delta).sum(2, keepdim=True) + x_term)
        plan = sigma * q * delta
        x_log, y_log = x_log + sigma.log(), y_log + delta.log()
    logarithms = x_log + y_log - cost * (iterations / beta)  # of the plan, in any range
    left = (smallest < torch.finfo(cost.dtype).tiny) & (logarithms > LOG_OF_NOTHING)
    lost = ((left | ~plan.isfinite()) & ~outside).flatten(1).any(1)
    if not readable(lost):
        plan = plan.masked_fill(lost[:, None, None], math.nan)
    elif lost.any():
        plan[lost] = _logarithmic_plan(
            cost[lost], x_padding[lost], y_padding[lost], beta, iterations, inner_iterations
        ).to(plan)
    return plan.masked_fill(outside, 0)


def _logarithmic_plan(cost, x_padding, y_padding, beta, iterations, inner_iterations):
    """The plan of the same iterations on the logarithms of its entries, in float64."""
    x_padding, y_padding = x_padding[:, :, None], y_padding[:, None, :]
    x_log, y_log = ((~t).sum((1, 2), keepdim=True).double().log() for t in (x_padding, y_padding))
    step = (-cost.double() / beta).masked_fill(x_padding | y_padding, -math.inf)
    plan, sigma = torch.zeros_like(step), -x_log
    for _ in range(iterations):
        q = plan + step
        for _ in range(inner_iterations):
            delta = -(y_log + (q + sigma).logsumexp(1, keepdim=True))
            delta = delta.masked_fill(y_padding, 0)
            sigma = -(x_log + (q + delta).logsumexp(2, keepdim=True))
            sigma = sigma.masked_fill(x_padding, 0)
        plan = sigma + q + delta
    return plan.exp()


def word_patch_alignment_loss(
    distance: torch.Tensor, is_positive: torch.Tensor, *, weight: float = 0.1
) -> torch.Tensor:
    """ViLT's loss: weight * (distances of matching pairs - distances of the others) / B.

    Args:
        distance: [B], from `word_patch_alignment`.
        is_positive: [B] bool, True where text and image belong together.
        weight: ViLT's 0.1.
    """
    check_tensor("distance", distance)
    if not isinstance(is_positive, torch.Tensor) or is_positive.dtype != torch.bool:
        got = getattr(is_positive, "dtype", type(is_positive).__name__)
        raise TypeError(f"is_positive: expected a bool tensor, got {got}; compare labels == 1")
    if distance.dim() != 1 or is_positive.shape != distance.shape:
        raise ValueError(
            f"is_positive: expected one value per distance, [B]; got {tuple(is_positive.shape)} "
            f"for distances {tuple(distance.shape)}"
        )
    return weight * torch.where(is_positive, distance, -distance).sum() / max(len(distance), 1)


def alignment_padding(
    text_lengths: torch.Tensor, image_lengths: torch.Tensor, text_size: int, image_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """ViLT's masks: ([B, text_size], [B, image_size]) bool, True where a position takes no part.

    Args:
        text_lengths: [B] tokens of each text, CLS and SEP included; both are left out.
        image_lengths: [B] positions of each image, CLS included, which is left out.
        text_size, image_size: Lx and Ly of the features, CLS included.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    Examples:
        >>> import torch
        >>> from fastvlp.ops import alignment_padding
        >>> words, _ = alignment_padding(torch.tensor([4]), torch.tensor([3]), 6, 3)
        >>> words
        tensor([[ True, False, False,  True,  True,  True]])
    """
    for name, t in (("text_lengths", text_lengths), ("image_lengths", image_lengths)):
        check_tensor(name, t, floating=False, dims=1)
    for name, size in (("text_size", text_size), ("image_size", image_size)):
        check_count(name, size)
    words = torch.arange(text_size, device=text_lengths.device)
    patches = torch.arange(image_size, device=image_lengths.device)
    inner = (words >= 1) & (words < text_lengths[:, None] - 1)
    return ~inner, ~((patches >= 1) & (patches < image_lengths[:, None]))


class _WordPatchAlignment(Function):
    @staticmethod
    def forward(ctx, x, y, x_padding, y_padding, beta, iterations, inner):
        distance, plan, x_rows, y_rows = torch.ops.fastvlp.word_patch_alignment(
            x, y, x_padding, y_padding, beta, iterations, inner
        )
        ctx.save_for_backward(x, y, plan, x_rows, y_rows)
        ctx.mark_non_differentiable(plan)
        ctx.set_materialize_grads(False)  # of the plan: zeros as large as it is
        return distance, plan

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * 7
        dx, dy = torch.ops.fastvlp.word_patch_alignment_gradients(
            grad.float().contiguous(), *ctx.saved_tensors
        )
        return dx, dy, None, None, None, None, None


register_operators()
register_backends(
    "word_patch_alignment",
    example={"text_features": (2, 3, 8), "image_features": (2, 4, 8)},
    first=native_on_cpu,
    **CANDIDATES,
)
