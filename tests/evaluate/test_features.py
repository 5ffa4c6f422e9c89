"""Features of a whole data set: their order, images with several captions, and ranks."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from fastvlp_tests import gloo_ranks
from fastvlp_tests.labelled_features import random_problem

from fastvlp.evaluate.features import encode
from fastvlp.evaluate.retrieval import retrieval
from fastvlp.evaluate.zero_shot import accuracy

PAIRS = 23


def batches(rank=0, world_size=1, rows=4):
    g = torch.Generator().manual_seed(0)
    images, noise = torch.randn(9, 6, generator=g), torch.randn(PAIRS, 6, generator=g)
    ids = torch.randint(0, 9, (PAIRS,), generator=g) * 100
    images = images[ids // 100]
    order = torch.randperm(PAIRS, generator=g)
    shares = order.split(rows * world_size)
    for index in (share.tensor_split(world_size)[rank] for share in shares):
        yield SimpleNamespace(
            images=images[index], tokens=(images + 2 * noise)[index], ids=ids[index], index=index
        )


def everything(**options):
    return encode(batches(**options), lambda x: 3 * x, lambda x: x)


def test_rows_have_norm_one_and_the_order_of_the_data():
    found = everything()
    each = {}
    for b in batches():
        each |= {int(i): row for i, *row in zip(b.index, b.images, b.tokens, strict=True)}
    assert len(found.images) == PAIRS
    for i in range(PAIRS):
        torch.testing.assert_close(found.images[i], F.normalize(each[i][0], dim=0))
        torch.testing.assert_close(found.texts[i], F.normalize(each[i][1], dim=0))


def test_an_image_with_several_captions_counts_once():
    found = everything()
    images, of_text = found.unique_images()
    assert len(images) == len(found.ids.unique())
    torch.testing.assert_close(images[of_text], found.images)


def test_an_image_is_as_good_as_its_best_caption():
    found = everything()
    images, of_text = found.unique_images()
    scores = images @ found.texts.T
    result = retrieval(images, found.texts, of_text)["image_to_text"]
    hits = 0
    for image, row in enumerate(scores):
        ranked = of_text[row.argsort(descending=True)]
        hits += image in ranked[:1].tolist()
    assert result["R@1"] == pytest.approx(hits / len(images))


def on_ranks(rank):
    import torch.distributed as dist

    group = dist.group.WORLD
    found = encode(batches(rank, 2), lambda x: 3 * x, lambda x: x, group=group)
    images, of_text = found.unique_images()
    directions = retrieval(images, found.texts, of_text, group=group)
    features, weights, labels = random_problem()
    accuracies = []
    for count in (30, 37):  # a rank may have no image
        own = slice(0, count) if rank == 0 else slice(count, None)
        accuracies.append(accuracy(features[own], weights, labels[own], group=group))
    return found.images, found.ids, directions, accuracies


def test_ranks_together_have_what_one_has():
    found = everything()
    images, of_text = found.unique_images()
    directions = retrieval(images, found.texts, of_text)
    for images, ids, found_directions, accuracies in gloo_ranks.run(2, on_ranks):
        assert torch.equal(images, found.images) and torch.equal(ids, found.ids)
        assert found_directions == directions
        assert accuracies == [pytest.approx(accuracy(*random_problem()))] * 2


def test_nothing_to_encode_is_refused():
    with pytest.raises(ValueError, match="at least one pair"):
        encode([], lambda x: x)
