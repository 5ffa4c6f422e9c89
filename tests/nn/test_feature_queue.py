"""FeatureQueue as a ring: order, wrap-around, validity, failure, state."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastvlp import FeatureQueue
from fastvlp.ops import momentum_contrastive


def pairs(first, rows, dim=4, device="cpu"):
    """Rows that say which pair they are, and their ids."""
    ids = torch.arange(first, first + rows, device=device)
    image = ids[:, None].float().expand(rows, dim).contiguous()
    return image, -image, ids


@given(size=st.integers(1, 9), batches=st.lists(st.integers(0, 20), max_size=6))
def test_keeps_the_last_pairs_in_ring_order(device, size, batches):
    queue = FeatureQueue(size, 4, with_ids=True, device=device)
    expected, first = [None] * size, 0
    for rows in batches:
        queue.enqueue(*pairs(first, rows, device=device))
        for pair in range(first, first + rows):
            expected[pair % size] = pair
        first += rows
        assert queue.position.item() == first % size
        assert queue.queue_length.item() == min(first, size)
        for slot, pair in enumerate(expected):
            assert queue.queue_ids[slot] == (-100 if pair is None else pair)
            if pair is not None:
                assert (queue.image_queue[slot] == pair).all()
                assert (queue.text_queue[slot] == -pair).all()


def test_empty_slots_are_no_keys_and_random_ones_are(device):
    image, text = (torch.nn.functional.normalize(torch.randn(5, 4, device=device), dim=1)
                   for _ in range(2))  # fmt: skip
    empty = FeatureQueue(50, 4, device=device)
    none = momentum_contrastive(image, text, image, text, image[:0], text[:0], 0.1)
    torch.testing.assert_close(
        momentum_contrastive(image, text, image, text, temperature=0.1, **empty.keys()).loss,
        none.loss,
    )
    full = FeatureQueue(50, 4, fill="random", device=device)
    assert full.queue_length == 50
    torch.testing.assert_close(full.image_queue.norm(dim=1), torch.ones(50, device=device))
    assert momentum_contrastive(
        image, text, image, text, temperature=0.1, **full.keys()
    ).loss > none.loss  # fmt: skip


def test_addresses_stay_and_dtypes_are_cast(device):
    queue = FeatureQueue(7, 4, dtype=torch.bfloat16, device=device)
    before = [t.data_ptr() for t in queue.buffers()]
    queue.enqueue(*pairs(0, 5, device=device)[:2])
    queue.enqueue(*pairs(5, 5, device=device)[:2])
    assert [t.data_ptr() for t in queue.buffers()] == before
    assert queue.image_queue.dtype == torch.bfloat16 and (queue.image_queue[0] == 7).all()


def test_the_gradient_survives_an_enqueue_before_backward(device):
    queue = FeatureQueue(8, 4, fill="random", device=device)
    image, text = torch.randn(2, 3, 4, device=device)
    grads = []
    for late in (False, True):
        leaf = image.clone().requires_grad_()
        state = {k: v.clone() for k, v in queue.state_dict().items()}
        loss = momentum_contrastive(
            leaf, text, image, text, temperature=0.5, seed=1, **queue.keys()
        ).loss
        if late:
            queue.enqueue(image, text)
        loss.backward()
        grads.append(leaf.grad)
        queue.load_state_dict(state)
    assert torch.equal(*grads)


def test_resumes_from_its_state(device):
    queue = FeatureQueue(7, 4, with_ids=True, device=device)
    queue.enqueue(*pairs(0, 10, device=device))
    other = FeatureQueue(7, 4, with_ids=True, fill="random", device=device)
    other.load_state_dict(queue.state_dict())
    for each in (queue, other):
        each.enqueue(*pairs(10, 3, device=device))
    for name, value in queue.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({0: [1.0]}, TypeError, "image_features: expected a torch.Tensor, got list"),
        ({0: torch.zeros(3, 5)}, ValueError, r"image_features: expected shape \[B, 4\]"),
        ({1: torch.zeros(2, 4)}, ValueError, r"text_features: .*the same B.*\(2, 4\)"),
        ({1: torch.zeros(3, 4).long()}, TypeError, "text_features: expected a floating-point"),
        ({1: torch.zeros(3, 4, device="meta")}, ValueError, "text_features: .*queue's device"),
        ({1: torch.full((3, 4), torch.nan)}, ValueError, "text_features: expected finite"),
        ({2: None}, ValueError, "ids: expected one per pair"),
        ({2: torch.zeros(3)}, TypeError, "ids: expected an int64 tensor"),
        ({2: torch.zeros(2).long()}, ValueError, r"ids: expected shape \[3\]"),
    ],
)
def test_a_refused_batch_leaves_the_queue_as_it_was(change, error, message):
    queue = FeatureQueue(7, 4, with_ids=True, check_finite=True)
    queue.enqueue(*pairs(0, 5))
    before = {k: v.clone() for k, v in queue.state_dict().items()}
    arguments = list(pairs(5, 3))
    for index, value in change.items():
        arguments[index] = value
    with pytest.raises(error, match=message):
        queue.enqueue(*arguments)
    for name, value in queue.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    "kwargs, error, message",
    [
        ({"size": 0}, ValueError, "size: expected a whole number above 0, got 0"),
        ({"dim": 1.5}, ValueError, "dim: expected a whole number"),
        ({"dtype": torch.int8}, TypeError, "dtype: expected one of"),
        ({"fill": "zeros"}, ValueError, "fill: expected 'empty' or 'random', got 'zeros'"),
    ],
)
def test_bad_construction(kwargs, error, message):
    with pytest.raises(error, match=message):
        FeatureQueue(**({"size": 4, "dim": 4} | kwargs))


def test_ids_for_a_queue_without_them():
    with pytest.raises(ValueError, match="ids: expected None.*with_ids=True"):
        FeatureQueue(4, 4).enqueue(*pairs(0, 2))


def test_enqueue_traces_without_a_graph_break(device):
    queue = FeatureQueue(7, 4, device=device)
    torch.compile(queue.enqueue, fullgraph=True, backend="aot_eager")(
        *pairs(0, 5, device=device)[:2]
    )
    assert queue.queue_length == 5 and (queue.image_queue[4] == 4).all()
