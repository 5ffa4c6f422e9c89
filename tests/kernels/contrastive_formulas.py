"""The contrastive formulas in plain PyTorch, at the dtype of their inputs."""

from dataclasses import dataclass

import torch


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
        # Copies: on some processors a bfloat16 product reads past the end of a row of odd width and
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


def through_product(problem: Problem, g: torch.Tensor):
    """dX and dY from the gradient of the logits, at its dtype."""
    scale, x, y = (t.to(g.dtype).contiguous() for t in (problem.scale, problem.x, problem.y))
    return scale * (g @ y), scale * (g.T @ x)


def scale_gradient(problem: Problem, g: torch.Tensor):
    """Derivative with respect to the scale from the gradient of the logits, at its dtype, and the
    size of its terms: of all together, and where their errors have random signs."""
    x, y = (t.to(g.dtype).contiguous() for t in (problem.x, problem.y))
    terms = g * (x @ y.T)
    return terms.sum(), terms.double().abs().sum().item(), terms.double().norm().item()
