"""Zero-shot classification against its definition."""

import pytest
import torch
import torch.nn.functional as F
from fastvlp_tests.labelled_features import random_problem

from fastvlp.evaluate.zero_shot import TEMPLATES, accuracy, classifier, prompts, read_templates


def letters(texts):
    """A tokenizer: counts of letters."""
    return torch.tensor([[text.lower().count(c) for c in "abcdefgh"] for text in texts])


def encode(tokens):
    g = torch.Generator().manual_seed(0)
    return tokens.float() @ torch.randn(8, 5, generator=g) + 0.1


@pytest.mark.parametrize("name", ["names", "templates"])
def test_one_string_in_place_of_several_is_refused(name):
    arguments = {"names": ["bee"], "templates": ["a {}"]}
    assert prompts(**arguments) == [["a bee"]]
    with pytest.raises(
        TypeError, match=f"{name}: expected a sequence of strings, got one, 'a {{}}'"
    ):
        prompts(**(arguments | {name: "a {}"}))
    with pytest.raises(
        TypeError, match="prompts_of_class: expected a sequence of prompts for each"
    ):
        classifier(["a bee", "a cab"], list, list)


def test_a_class_is_the_mean_of_its_normalised_prompts():
    named = prompts(["bee", "cab", "egg"], ["{}", "a {}", "dead {}"])
    assert named[1] == ["cab", "a cab", "dead cab"]
    weights = classifier(named, letters, encode)
    for row, texts in zip(weights, named, strict=True):
        each = F.normalize(encode(letters(texts)), dim=-1)
        torch.testing.assert_close(row, F.normalize(each.mean(0), dim=-1))


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_batches_do_not_change_the_classes_even_of_unlike_sizes(batch_size):
    uneven = [["a"], ["b", "c", "d"], ["ab", "cd"]]
    whole = classifier(uneven, letters, encode)
    torch.testing.assert_close(classifier(uneven, letters, encode, batch_size=batch_size), whole)


def by_sorting(features, weights, labels, k):
    top = (features @ weights.T).argsort(1, descending=True)[:, :k]
    return (top == labels[:, None]).any(1)


@pytest.mark.parametrize("chunk", [1, 10, 4096])
def test_accuracy_is_that_of_sorted_products(chunk):
    features, weights, labels = random_problem()
    found = accuracy(features, weights, labels, ks=(1, 3), chunk=chunk)
    for k in (1, 3):
        wanted = by_sorting(features, weights, labels, k).double().mean().item()
        assert found[f"top-{k}"] == pytest.approx(wanted)
        assert found[f"chance top-{k}"] == k / 6
    first = by_sorting(features, weights, labels, 1).double()
    # The last class has no image and does not count.
    means = [first[labels == c].mean().item() for c in labels.unique()]
    assert found["mean per class"] == pytest.approx(sum(means) / 5)


def test_equal_products_are_no_merit():
    found = accuracy(torch.ones(3, 2), torch.ones(4, 2), torch.tensor([0, 1, 2]))
    assert found["top-1"] == 0.0 and found["top-5"] == 1.0
    nothing = accuracy(torch.full((1, 2), float("nan")), torch.ones(4, 2), torch.tensor([0]))
    assert nothing["top-1"] == 0.0


def test_templates_are_read_and_checked(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a photo of a {}.\n\n{}!\n")
    assert read_templates(path) == ["a photo of a {}.", "{}!"]
    assert all(t.count("{}") == 1 for t in TEMPLATES)
    path.write_text("a photo\n")
    with pytest.raises(ValueError, match=r"one \{\} in each template, got 'a photo'"):
        read_templates(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="expected one template a line, got none"):
        read_templates(path)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(36, dtype=torch.int64), r"int64 \[37\]"),
        (torch.zeros(37), r"int64 \[37\]"),
        (torch.full((37,), 6), "expected 0 to 5"),
        (torch.full((37,), -1), "expected 0 to 5"),
    ],
)
def test_wrong_labels_are_named(labels, message):
    features, weights, _ = random_problem()
    with pytest.raises(ValueError, match=f"labels: .*{message}"):
        accuracy(features, weights, labels)


def test_a_class_without_prompts_is_refused():
    with pytest.raises(ValueError, match="at least one prompt"):
        classifier([["a"], []], letters, encode)
    with pytest.raises(ValueError, match="expected at least one image"):
        accuracy(torch.ones(0, 5), torch.ones(2, 5), torch.zeros(0, dtype=torch.int64))


def test_autocast_makes_no_ties():
    angles = torch.linspace(0, 1, 64)
    features, labels = torch.stack([angles.cos(), angles.sin()], 1), torch.arange(64)
    with torch.autocast("cpu", torch.bfloat16):
        assert accuracy(features, features, labels)["top-1"] == 1.0
