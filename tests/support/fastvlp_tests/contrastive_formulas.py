"""The contrastive formulas in plain PyTorch, at the dtype of their inputs, and checks by them.

The checks take `run_kernel(module, function, *args, **kwargs)`, whichever way it runs a kernel.
"""

import math
from dataclasses import dataclass

import torch

from fastvlp_tests.tolerance import assert_as_accurate, epsilon

SINGLE = epsilon(torch.float32)


@dataclass(frozen=True)
class Problem:
    """x [M, D], y [N, D], scale and bias (float32, one element); row i pairs with i + offset."""

    x: torch.Tensor
    y: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor
    offset: int

    @property
    def size(self) -> tuple[int, int]:
        return len(self.x), len(self.y)

    def logits(self, dtype: torch.dtype) -> torch.Tensor:
        # Copies: on some CPUs a bfloat16 matmul reads past the end of a row of odd width and
        # multiplies what is there, NaN here, by 0.
        x, y = (t.to(dtype).contiguous() for t in (self.x, self.y))
        return self.scale.to(dtype) * (x @ y.T)

    def is_pair(self) -> torch.Tensor:
        m, n = self.size
        row = torch.arange(m, device=self.x.device)[:, None]
        return torch.arange(n, device=self.x.device)[None, :] == row + self.offset


def draw(m, n, width, dtype, device, *, offset=0, scale=10.0, bias=0.0, norm=1.0, gap=0, seed=0):
    """`norm` None leaves rows of length sqrt(width); `gap` pads the rows in memory with NaN."""
    g = torch.Generator().manual_seed(seed)
    pair = []
    for length in (m, n):
        t = torch.randn(length, width, generator=g, dtype=torch.float64)
        if norm is not None:
            t = norm * torch.nn.functional.normalize(t, dim=1)
        wide = torch.full((length, width + gap), torch.nan, dtype=dtype)
        wide[:, :width] = t.to(dtype)
        pair.append(wide.to(device)[:, :width])
    scalars = (torch.tensor([v], dtype=torch.float32, device=device) for v in (scale, bias))
    return Problem(*pair, *scalars, offset)


def in_classes(rows, width, cosine, dtype, device):
    """Unit rows of four classes in turn, of which those of one class have about this cosine."""
    g = torch.Generator().manual_seed(5)
    centres, noise = (
        torch.nn.functional.normalize(
            torch.randn(n, width, generator=g, dtype=torch.float64), dim=1
        )
        for n in (4, rows)
    )
    mixed = cosine**0.5 * centres[torch.arange(rows) % 4] + (1 - cosine) ** 0.5 * noise
    return torch.nn.functional.normalize(mixed, dim=1).to(dtype).to(device)


def statistics(problem: Problem, dtype: torch.dtype):
    """Log-sum-exps over the negatives of rows and columns, and the positives' logits."""
    z = problem.logits(dtype)
    pairs = problem.is_pair()
    negatives = z.masked_fill(pairs, -torch.inf)
    return negatives.logsumexp(1), negatives.logsumexp(0), z.masked_fill(~pairs, 0).sum(1)


def gradient_inputs(problem: Problem, weights):
    """(row_lse, col_lse, positive_gradient), as the gradient kernel takes them."""
    z = problem.logits(torch.float64)
    positives = softmax_gradient(problem, weights, torch.float64)
    positives = positives.masked_fill(~problem.is_pair(), 0).sum(1)
    return z.logsumexp(1), z.logsumexp(0), positives.float()


def softmax_gradient(problem: Problem, weights, dtype: torch.dtype):
    """The gradient of the logits; a term of weight 0 is left out, whatever its logits are."""
    z = problem.logits(dtype)
    weights = weights.to(dtype)
    terms = [w * z.softmax(dim) for dim, w in zip((1, 0), weights, strict=True) if w != 0]
    return sum(terms) - weights.sum() * problem.is_pair()


def sigmoid_terms(problem: Problem, dtype: torch.dtype):
    """The losses [M, N] and the gradient of the logits."""
    z = problem.logits(dtype) + problem.bias.to(dtype)
    pair = problem.is_pair()
    loss = -torch.nn.functional.logsigmoid(torch.where(pair, z, -z))
    return loss, torch.where(pair, -torch.sigmoid(-z), torch.sigmoid(z))


def through_matmul(problem: Problem, g: torch.Tensor):
    """dX and dY from the gradient of the logits, at its dtype."""
    scale, x, y = (t.to(g.dtype).contiguous() for t in (problem.scale, problem.x, problem.y))
    return scale * (g @ y), scale * (g.T @ x)


def scale_gradient(problem: Problem, g: torch.Tensor):
    """Derivative with respect to the scale from the gradient of the logits, at its dtype, and the
    sum of its terms' absolute values."""
    x, y = (t.to(g.dtype).contiguous() for t in (problem.x, problem.y))
    terms = g * (x @ y.T)
    return terms.sum(), terms.double().abs().sum().item()


def sharpness(problem):
    """Relative rounding of exp(z) when z itself is right to a float32 rounding."""
    z = problem.logits(torch.float64) + problem.bias  # the bias is 0 but for the sigmoid loss
    return SINGLE * (1 + z.abs().max().item())


def check_statistics(run_kernel, problem, **wanted):
    ours = run_kernel(
        "contrastive.forward", "contrastive_statistics", problem.x, problem.y, problem.scale,
        offset=problem.offset, **wanted,
    )  # fmt: skip
    eager = statistics(problem, problem.x.dtype)
    exact = statistics(problem, torch.float64)
    for name, our, near, true in zip(("rows", "cols", "positive"), ours, eager, exact, strict=True):
        if wanted.get(name) is False:
            assert our is None
            continue
        assert our.dtype == (torch.float32 if name == "positive" else torch.float64)
        some = true > -torch.inf  # the log-sum-exp of no negatives
        assert torch.equal(our > -torch.inf, some)
        floor = sharpness(problem) * math.sqrt(true.numel())
        assert_as_accurate(name, our[some], near[some], true[some], floor)
    return ours


def check_feature_gradients(names, ours, eager, exact, problem, g):
    """dX and dY, `g` being the exact gradient of the logits."""
    dtype = problem.x.dtype
    sides = through_matmul(
        Problem(problem.x.abs(), problem.y.abs(), problem.scale, problem.bias, 0), g.abs()
    )
    for name, our, near, true, terms in zip(names, ours, eager, exact, sides, strict=True):
        assert our.dtype == dtype
        # Rounding of p and of the result; and of g, whose roundings add up with random signs.
        floor = sharpness(problem) * terms.norm().item() + epsilon(dtype) * true.norm().item()
        if dtype != torch.float32:
            floor += epsilon(dtype) * terms.norm().item() / math.sqrt(min(problem.size))
        assert_as_accurate(name, our, near, true, floor)


def check_scale_gradient(ours, problem, eager, exact):
    """`eager` and `exact` are gradients of the logits; ours sums it in float32 in every dtype."""
    (near, _), (true, size) = (scale_gradient(problem, g) for g in (eager, exact))
    assert ours.shape == () and ours.dtype == torch.float32
    assert_as_accurate("dscale", ours, near, true, sharpness(problem) * size)


def check_gradients(run_kernel, problem, weights, workspace_bytes, *, rows=True, cols=True):
    weights = torch.tensor(weights, device=problem.x.device)
    used = weights * torch.tensor([rows, cols], device=weights.device)
    row_lse, col_lse, positives = gradient_inputs(problem, used)
    ours = run_kernel(
        "contrastive.backward", "contrastive_gradients", problem.x, problem.y, problem.scale,
        row_lse if rows else None, col_lse if cols else None, positives, weights,
        offset=problem.offset, workspace_bytes=workspace_bytes,
    )  # fmt: skip
    g = softmax_gradient(problem, used, torch.float64)
    eager = softmax_gradient(problem, used, problem.x.dtype)
    check_feature_gradients(
        ("dx", "dy"), ours[:2], through_matmul(problem, eager),
        through_matmul(problem, g), problem, g,
    )  # fmt: skip
    check_scale_gradient(ours[2], problem, eager, g)
    return ours[:2]


def check_sigmoid(run_kernel, problem, workspace_bytes, weight=1.0):
    ours = run_kernel(
        "contrastive.sigmoid", "sigmoid_contrastive", problem.x, problem.y, problem.scale,
        problem.bias, offset=problem.offset, weight=weight, workspace_bytes=workspace_bytes,
    )  # fmt: skip
    loss, g = sigmoid_terms(problem, torch.float64)
    near_loss, near_g = sigmoid_terms(problem, problem.x.dtype)
    size = loss.sum().item() + problem.logits(torch.float64).abs().sum().item()
    assert_as_accurate("loss", ours.loss_sum, near_loss.sum(), loss.sum(), SINGLE * size)
    floor = sharpness(problem) * g.abs().sum().item()
    assert_as_accurate("g", ours.g_sum, near_g.sum(), g.sum(), floor)
    check_feature_gradients(
        ("dx", "dy"), (ours.dx, ours.dy), through_matmul(problem, weight * near_g),
        through_matmul(problem, weight * g), problem, weight * g,
    )  # fmt: skip
    check_scale_gradient(ours.dscale, problem, weight * near_g, weight * g)
    return ours
