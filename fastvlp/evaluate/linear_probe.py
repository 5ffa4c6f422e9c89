"""A linear classifier on frozen features: how much of the classes they hold.

Radford et al. 2021, section 3.2 and appendix A.3: logistic regression by L-BFGS, with the strength
of its L2 penalty chosen on a part of the training data.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvlp.evaluate import zero_shot

# From strong to weak: of equal accuracies the stronger penalty counts.
PENALTIES = tuple(10.0**power for power in range(0, -8, -1))
_HELD_OUT, _STEPS = 0.2, 200


def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    penalties: Sequence[float] = PENALTIES,
    seed: int = 0,
) -> dict[str, float]:
    """Accuracy on the test data of a logistic regression that is fitted to the training data.

    Fitted in float64 on the features' device, from weights of 0: equal arguments give equal
    results.

    Args:
        train_features: [n, dim] floating point; of norm 1, as `encode` gives them, or not.
        train_labels: int64 [n], from 0; each class must occur.
        test_features: [m, dim].
        test_labels: int64 [m], classes of the training data.
        penalties: the weights of half the sum of squares to choose from, on a fifth of the training
            data; a single one is taken as it is.
        seed: of the choice of that fifth.

    Returns:
        "top-1", "top-5", their "chance", "mean per class", and "penalty", the one chosen.

    Raises:
        ValueError: shapes or labels are not as described, or there are fewer than two classes.

    Example:
        >>> x = torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1], [0.1, 0.9]])
        >>> y = torch.tensor([0, 0, 1, 1])
        >>> linear_probe(x, y, x, y, penalties=[1e-3])["top-1"]
        1.0
    """
    classes = _check(train_features, train_labels, test_features, test_labels)
    if not penalties or min(penalties) < 0:
        raise ValueError(f"penalties: expected numbers of 0 or more, got {list(penalties)}")
    with torch.inference_mode(False), torch.enable_grad():
        # Copies, which can be differentiated through even if the features were inferred.
        x, y = _with_ones(train_features), train_labels.clone()
        chosen = penalties[0] if len(penalties) == 1 else _choose(x, y, classes, penalties, seed)
        weights = _fit(x, y, classes, chosen)
        rows = _with_ones(test_features).float()
        found = zero_shot.accuracy(rows, weights.float(), test_labels.clone())
    return found | {"penalty": chosen}


def _check(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor
) -> int:
    for name, features, labels in (
        ("train", train_features, train_labels),
        ("test", test_features, test_labels),
    ):
        if features.ndim != 2 or not len(features):
            raise ValueError(
                f"{name}_features: expected [n, dim], at least one, got {list(features.shape)}"
            )
        if labels.shape != features.shape[:1] or labels.dtype != torch.int64:
            raise ValueError(
                f"{name}_labels: expected int64 [{len(features)}], got {labels.dtype} "
                f"{list(labels.shape)}"
            )
    classes = int(train_labels.max()) + 1
    if classes < 2 or len(train_labels.unique()) != classes or int(train_labels.min()) < 0:
        raise ValueError(
            f"train_labels: expected each of 0 to {max(classes - 1, 1)}, got "
            f"{train_labels.unique().tolist()[:20]}"
        )
    if not 0 <= int(test_labels.min()) <= int(test_labels.max()) < classes:
        raise ValueError(f"test_labels: expected 0 to {classes - 1}, got others")
    return classes


def _with_ones(features: Tensor) -> Tensor:
    """[n, dim] to float64 [n, dim + 1], the last column for the bias."""
    wide = features.double().clone()
    return torch.cat([wide, wide.new_ones(len(wide), 1)], dim=1)


def _choose(x: Tensor, y: Tensor, classes: int, penalties: Sequence[float], seed: int) -> float:
    """The penalty of the highest accuracy on a part that is not fitted, the first of equal ones."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)
    held_out = order[: max(1, int(_HELD_OUT * len(x)))]
    fitted = order[len(held_out) :]
    best, chosen = -1.0, penalties[0]
    for penalty in penalties:
        weights = _fit(x[fitted], y[fitted], classes, penalty)
        right = (x[held_out] @ weights.T).argmax(1) == y[held_out]
        accuracy = right.double().mean().item()
        if accuracy > best:
            best, chosen = accuracy, penalty
    return chosen


def _fit(x: Tensor, y: Tensor, classes: int, penalty: float) -> Tensor:
    """Weights [classes, dim + 1] of the least cross-entropy; the bias has no penalty."""
    weights = torch.zeros(classes, x.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=_STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weights.T, y) + penalty / 2 * weights[:, :-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()
