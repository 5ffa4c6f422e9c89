"""Retrieval metrics against a brute-force ranking in exact integer arithmetic."""

from itertools import combinations
from statistics import mean, median

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fastvlp.evaluate.retrieval import retrieval

KS = (1, 2, 5)


def brute_force(images, texts, owner, ks=KS):
    """Rank every candidate by sorting; wrong candidates come first among equals."""
    scores = [[sum(a * b for a, b in zip(i, t, strict=True)) for t in texts] for i in images]

    def rank(right, score):
        order = sorted(range(len(score)), key=lambda j: (-score[j], j in right))
        return 1 + min(order.index(j) for j in right)

    columns = list(zip(*scores, strict=True))
    to_image = [rank({owner[t]}, columns[t]) for t in range(len(texts))]
    captions = [{t for t, o in enumerate(owner) if o == i} for i in range(len(images))]
    to_text = [rank(captions[i], scores[i]) for i in range(len(images)) if captions[i]]
    return [
        {**{f"R@{k}": mean(r <= k for r in ranks) for k in ks}, "median_rank": median(ranks)}
        for ranks in (to_image, to_text)
    ]


@st.composite
def problems(draw):
    dim = draw(st.integers(1, 3))
    row = st.lists(st.integers(-2, 2), min_size=dim, max_size=dim)
    images = draw(st.lists(row, min_size=1, max_size=9))
    texts = draw(st.lists(row, min_size=1, max_size=12))
    owner = draw(
        st.lists(st.integers(0, len(images) - 1), min_size=len(texts), max_size=len(texts))
    )
    return images, texts, owner


@settings(deadline=None, max_examples=200)
@given(
    problem=problems(),
    workspace=st.sampled_from([1, 100, 2**20]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_equals_brute_force(problem, workspace, dtype):
    """Small integers have exact products in every dtype, so ties are true ties."""
    images, texts, owner = problem
    got = retrieval(
        torch.tensor(images, dtype=dtype),
        torch.tensor(texts, dtype=dtype),
        torch.tensor(owner),
        ks=KS,
        workspace_bytes=workspace,
    )
    expected = brute_force(*problem)
    for direction, right in zip(("text_to_image", "image_to_text"), expected, strict=True):
        assert {key: got[direction][key] for key in right} == pytest.approx(right, abs=1e-12)


def test_perfect_features_with_one_caption_each():
    features = torch.eye(7)
    result = retrieval(features, features)
    for direction in ("text_to_image", "image_to_text"):
        assert result[direction]["R@1"] == 1
        assert result[direction]["median_rank"] == 1
        assert result[direction]["chance_R@5"] == pytest.approx(5 / 7)
        assert result[direction]["chance_R@10"] == 1


def test_constant_features_score_nothing():
    result = retrieval(torch.ones(40, 3), torch.ones(40, 3))
    for direction in ("text_to_image", "image_to_text"):
        assert result[direction]["R@1"] == result[direction]["R@10"] == 0
        assert result[direction]["median_rank"] == 40


def test_best_caption_counts():
    """Image 0 has a caption at rank 1 and one at rank 3."""
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    texts = torch.tensor([[0.9, 0.0], [0.1, 0.0], [0.5, 0.8]])
    result = retrieval(images, texts, torch.tensor([0, 0, 1]))
    assert result["image_to_text"]["R@1"] == 1
    assert result["text_to_image"]["R@1"] == 1


def test_chance_is_the_mean_over_all_orders():
    """Two images with two captions and one: every choice of k texts is counted."""
    owner = [0, 1, 0]
    result = retrieval(torch.eye(2), torch.ones(3, 2), torch.tensor(owner), ks=(1, 2))
    for k in (1, 2):
        hits = [
            any(owner[t] == image for t in chosen)
            for image in (0, 1)
            for chosen in combinations(range(3), k)
        ]
        assert result["image_to_text"][f"chance_R@{k}"] == pytest.approx(mean(hits))


def test_image_without_text_is_only_a_candidate():
    images, texts = torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    result = retrieval(images, texts, torch.tensor([0]))
    assert result["image_to_text"]["R@1"] == 1
    assert result["text_to_image"]["R@1"] == 0
    assert result["text_to_image"]["median_rank"] == 2


def test_nan_from_overflow_is_a_miss():
    big = torch.finfo(torch.float64).max
    images = torch.tensor([[big, -big], [1.0, 1.0]], dtype=torch.float64)
    texts = torch.tensor([[big, big], [2.0, 2.0]], dtype=torch.float64)
    result = retrieval(images, texts)
    assert result["image_to_text"]["R@1"] <= 0.5
    assert result["text_to_image"]["R@1"] <= 0.5


class LargestTensor(TorchDispatchMode):
    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.bytes = max(self.bytes, out.nbytes)
        return out


@pytest.mark.parametrize("workspace", [2**14, 2**18])
def test_workspace_bounds_every_tensor(workspace):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1000, 4, generator=generator)
    with LargestTensor() as largest:
        retrieval(features, features, workspace_bytes=workspace)
    assert largest.bytes <= max(workspace, features.nbytes)


def test_workspace_does_not_change_the_result():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(300, 16, generator=generator, dtype=torch.float64)
    texts = torch.randn(700, 16, generator=generator, dtype=torch.float64)
    owner = torch.randint(300, (700,), generator=generator)
    assert retrieval(images, texts, owner, workspace_bytes=10_000) == retrieval(
        images, texts, owner
    )


@pytest.mark.parametrize(
    "arguments, error, name",
    [
        ((torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3)), TypeError, "image_features"),
        ((torch.ones(2, 3), torch.ones(2, 3, dtype=torch.int64)), TypeError, "text_features"),
        ((torch.ones(2, 3), torch.ones(2, 3, dtype=torch.float64)), TypeError, "text_features"),
        ((torch.ones(2, 3), torch.ones(2, 4)), ValueError, "text_features"),
        ((torch.ones(0, 3), torch.ones(0, 3)), ValueError, "image_features"),
        ((torch.ones(2, 3), torch.ones(3)), ValueError, "text_features"),
        ((torch.full((2, 3), torch.nan), torch.ones(2, 3)), ValueError, "image_features"),
        ((torch.ones(2, 3), torch.ones(4, 3)), ValueError, "image_of_text"),
        ((torch.ones(2, 3), torch.ones(4, 3), torch.zeros(4)), TypeError, "image_of_text"),
        (
            (torch.ones(2, 3), torch.ones(4, 3), torch.zeros(3, dtype=torch.int64)),
            ValueError,
            "image_of_text",
        ),
        ((torch.ones(2, 3), torch.ones(2, 3), torch.tensor([0, 2])), ValueError, "image_of_text"),
        ((torch.ones(2, 3), torch.ones(2, 3), torch.tensor([0, -1])), ValueError, "image_of_text"),
    ],
)
def test_errors_name_the_argument(arguments, error, name):
    with pytest.raises(error, match=f"^{name} "):
        retrieval(*arguments)


@pytest.mark.parametrize("ks", [(), (0,), (1.5,)])
def test_bad_ks(ks):
    with pytest.raises(ValueError, match="^ks "):
        retrieval(torch.eye(2), torch.eye(2), ks=ks)


def test_autocast_makes_no_ties():
    """Neighbours on a circle, whose products differ by less than bfloat16 tells apart."""
    angles = torch.linspace(0, 1, 64)
    features = torch.stack([angles.cos(), angles.sin()], 1)
    plain = retrieval(features, features)
    with torch.autocast("cpu", torch.bfloat16):
        assert retrieval(features, features) == plain
    assert plain["text_to_image"]["R@1"] == 1.0


def test_intervals_are_of_the_recalls_and_only_where_they_are_asked_for():
    torch.manual_seed(0)
    images = torch.randn(40, 4)
    texts = images + torch.randn(40, 4)
    plain = retrieval(images, texts)
    sure = retrieval(images, texts, confidence=0.9, seed=3)
    for direction, result in plain.items():
        assert result.items() <= sure[direction].items() and "R@1 low" not in result
        for k in (1, 5, 10):
            ends = sure[direction][f"R@{k} low"], sure[direction][f"R@{k} high"]
            assert ends[0] < result[f"R@{k}"] < ends[1]
    assert retrieval(images, texts, confidence=0.9, seed=3) == sure
