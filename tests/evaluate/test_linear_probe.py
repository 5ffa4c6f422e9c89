"""The linear probe: its optimum, its accuracy, its choice of a penalty."""

import pytest
import torch

from fastvlp.evaluate import linear_probe as module
from fastvlp.evaluate.linear_probe import linear_probe


def blobs(count, spread, seed):
    """Points around three centres in 5 dimensions, with their classes."""
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.eye(5)[:3]
    labels = torch.arange(count) % 3
    return centres[labels] + spread * torch.randn(count, 5, generator=generator), labels


def test_separate_classes_are_told_apart_and_chance_is_chance():
    found = linear_probe(*blobs(60, 0.2, 0), *blobs(30, 0.2, 1))
    assert found["top-1"] == found["mean per class"] == 1.0
    assert found["chance top-1"] == pytest.approx(1 / 3)
    features, _ = blobs(300, 1.0, 2)
    labels = torch.randint(0, 3, (300,), generator=torch.Generator().manual_seed(0))
    guessed = linear_probe(features[:200], labels[:200], features[200:], labels[200:])
    assert guessed["top-1"] < 0.5


@pytest.mark.parametrize("penalty", [1.0, 0.01])
def test_the_weights_are_where_the_gradient_vanishes(penalty):
    x, y = blobs(90, 1.0, 3)
    x = module._with_ones(x)
    weights = module._fit(x, y, 3, penalty)
    probs = (x @ weights.T).softmax(1) - torch.nn.functional.one_hot(y, 3)
    gradient = probs.T @ x / len(x)
    gradient[:, :-1] += penalty * weights[:, :-1]
    assert gradient.abs().max() < 1e-5 and weights.dtype is torch.float64


def test_noise_asks_for_a_stronger_penalty_than_one_that_fits_everything():
    features = torch.randn(60, 200, generator=torch.Generator().manual_seed(0))
    labels = (features[:, 0] > 0).long()
    chosen = linear_probe(features, labels, features, labels)["penalty"]
    assert chosen in module.PENALTIES
    given = linear_probe(features, labels, features, labels, penalties=[0.5])
    assert given["penalty"] == 0.5 and given == linear_probe(
        features, labels, features, labels, penalties=[0.5]
    )


def test_inferred_features_are_taken():
    with torch.inference_mode():
        train, test = blobs(60, 0.2, 0), blobs(30, 0.2, 1)
        assert linear_probe(*train, *test, penalties=[1e-3])["top-1"] == 1.0


X, Y = torch.zeros(4, 2), torch.tensor([0, 1, 0, 1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X, Y[:3], X, Y), "train_labels: expected int64 \\[4\\]"),
        ((X, Y, X[:0], Y[:0]), "test_features: expected \\[n, dim\\], at least one"),
        ((X, Y * 0, X, Y), "train_labels: expected each of 0 to 1"),
        ((X, Y * 2, X, Y), "train_labels: expected each of 0 to 2"),
        ((X, Y, X, Y + 1), "test_labels: expected 0 to 1"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        linear_probe(*arguments)
    with pytest.raises(ValueError, match="penalties: expected numbers of 0 or more"):
        linear_probe(X, Y, X, Y, penalties=[-1.0])
