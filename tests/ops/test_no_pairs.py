"""Losses of batches without pairs: 0, with a zero gradient for everything they depend on."""

import pytest
import torch

from fastvlp import FeatureQueue
from fastvlp.losses import ClipLoss, SigLipLoss
from fastvlp.ops import contrastive, momentum_contrastive

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def leaves(dtype):
    features = [torch.empty(0, 8, dtype=dtype, requires_grad=True) for _ in range(2)]
    return features, [torch.tensor(v, requires_grad=True) for v in (5.0, -2.0)]


def assert_zero(loss, features, scalars):
    loss.backward()
    assert loss.item() == 0 and loss.ndim == 0
    assert loss.dtype == (torch.float64 if features[0].dtype == torch.float64 else torch.float32)
    assert all(f.grad.shape == (0, 8) for f in features)
    assert [s.grad.item() for s in scalars] == [0] * len(scalars)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [ClipLoss, SigLipLoss])
def test_contrastive(kind, dtype):
    features, scalars = leaves(dtype)
    assert_zero(kind()(*features, *scalars), features, scalars)


@pytest.mark.parametrize("direction", ["image_to_text", "text_to_image"])
def test_one_direction(direction):
    features, scalars = leaves(torch.float32)
    assert_zero(contrastive(*features, *scalars, direction=direction), features, scalars)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 3])
def test_momentum_contrastive_and_its_negatives(dtype, rows):
    features, (temperature, _) = leaves(dtype)
    queue = FeatureQueue(4, 8, dtype=dtype, with_ids=True)
    queue.enqueue(*torch.randn(2, rows, 8), torch.arange(rows))
    none = torch.empty(0, 8, dtype=dtype)
    ids = torch.empty(0, dtype=torch.int64)
    found = momentum_contrastive(
        *features, none, none, temperature=temperature, ids=ids, **queue.keys()
    )
    assert_zero(found.loss, features, [temperature])
    for negatives in found[1:]:
        assert negatives.dtype == torch.int64 and negatives.shape == (0,)
    state = {name: value.clone() for name, value in queue.state_dict().items()}
    queue.enqueue(none, none, ids)
    assert all(torch.equal(value, state[name]) for name, value in queue.state_dict().items())
