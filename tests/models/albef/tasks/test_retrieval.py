"""ALBEF's retrieval: the fine-tuning loss, and two-round evaluation against scoring every pair."""

import re

import pytest
import torch
from fastvlp_tests.albef_head_cases import (
    LENGTHS,
    assert_forms_agree,
    assert_saved_and_loaded,
    disturb,
    fresh,
    make_images,
    sentences,
)
from fastvlp_tests.gloo_ranks import run, several

from fastvlp.evaluate.retrieval import retrieval_from_scores
from fastvlp.models.albef.tasks import rerank as albef_rerank
from fastvlp.models.albef.tasks import retrieval as albef_retrieval
from fastvlp.ops.packing import PairLayout, TextLayout

IDS = torch.tensor([7, 8, 7, 9])
COUNTS = 5, 7  # images, texts
TEXT_LENGTHS = [9, 4, 6, 5, 1, 3, 8]


def make(**overrides):
    model = disturb(fresh(albef_retrieval.create, **overrides))
    model.temp.data.fill_(0.07)
    return model


def loss(images):
    arguments = sentences(4, 9), LENGTHS, IDS, 0.3
    return lambda model: model.retrieval_loss(images, *arguments, update=False, seed=3)


def test_forms_agree():
    assert_forms_agree(make(), loss(make_images(4)), loss(make_images(4).double()))


def test_the_contrast_has_pairs_of_equal_id_as_positives_over_batch_and_queue():
    model = make().eval()
    with torch.no_grad():
        model.queue.queue_ids[:3] = torch.tensor([9, 7, 5])
        texts = TextLayout.from_lengths(LENGTHS, 9)
        features = []
        for towers in (model.student, model.teacher):
            first = texts.first(towers.encode_text(sentences(4, 9), texts))
            images = towers.image_features(towers.encode_image(make_images(4)))
            features.append((images, towers.text_features(first)))
        (image, text), (image_m, text_m) = features
        positive = torch.cat([IDS, model.queue.queue_ids]) == IDS[:, None]
        wanted = 0
        for rows, rows_m, keys, queue in (
            (image, image_m, text_m, model.queue.text_queue),
            (text, text_m, image_m, model.queue.image_queue),
        ):
            keys = torch.cat([keys, queue]).T / model.temp
            target = 0.7 * positive / positive.sum(1, keepdim=True) + 0.3 * (rows_m @ keys).softmax(
                1
            )
            wanted = wanted - (target * (rows @ keys).log_softmax(1)).sum(1).mean() / 2
    torch.testing.assert_close(loss(make_images(4))(model).itc, wanted, rtol=1e-5, atol=0)


def test_a_step_moves_the_momentum_encoder_and_fills_the_queue():
    model = make()
    weight = model.momentum.module.text_proj.weight
    moved = weight.lerp(model.student.text_proj.weight, 1 - model.config.momentum).detach()
    model.retrieval_loss(make_images(4), sentences(4, 9), LENGTHS, IDS)
    torch.testing.assert_close(weight, moved)
    assert torch.equal(model.queue.queue_ids[:4], IDS) and model.queue.position == 4


def test_batches_of_one_image_have_no_negatives():
    model = make().eval()
    found = model.retrieval_loss(make_images(2), sentences(2, 9), [9, 4], IDS[:1].repeat(2), seed=1)
    texts = TextLayout.from_lengths([9, 4], 9)
    pairs = PairLayout.make(texts, [0, 1], [0, 1], 2)
    student = model.student
    tokens = student.encode_image(make_images(2))
    fused = student.fuse(student.encode_text(sentences(2, 9), texts), pairs, tokens)
    wanted = -model.itm_head(pairs.first(fused)).log_softmax(-1)[:, 1].mean()
    torch.testing.assert_close(found.itm, wanted)


def test_save_and_load(tmp_path):
    assert_saved_and_loaded(
        make(), tmp_path, albef_retrieval.load, lambda m: loss(make_images(4))(m).total.detach()
    )


def test_bad_input_leaves_the_state():
    model = make()
    before = {k: v.clone() for k, v in model.state_dict().items() if "extra" not in k}
    given = dict(images=make_images(4), text_ids=sentences(4, 9), text_mask=LENGTHS, ids=IDS)
    for change, message in (
        (dict(ids=IDS[:3]), r"ids: expected int64 \[4\]"),
        (dict(alpha=-1.0), "alpha: expected"),
        (dict(images=make_images(3)), "text_ids: expected one text"),
    ):
        with pytest.raises(ValueError, match=message):
            model.retrieval_loss(**(given | change))
    after = model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    with pytest.raises(ValueError, match="queue_ids: expected True"):
        albef_retrieval.create("tiny", queue_ids=False)
    with pytest.raises(RuntimeError, match="pretraining=True"):
        albef_retrieval.create("tiny", pretraining=False).retrieval_loss(**given)


def sets(model):
    images, ids = make_images(COUNTS[0]), sentences(COUNTS[1], 9)
    batches = [(ids[:3], TEXT_LENGTHS[:3]), (ids[3:], TEXT_LENGTHS[3:])]
    return (
        albef_rerank.encode_images(model, images.split(2)),
        albef_rerank.encode_texts(model, batches),
    )


@torch.no_grad()
def every_pair(model):
    """[images, texts]: all pairs fused in one call, no key or value kept."""
    (images, texts), student = COUNTS, model.student
    layout = TextLayout.from_lengths(TEXT_LENGTHS, 9)
    tokens = student.encode_text(sentences(texts, 9), layout)
    pairs = PairLayout.make(
        layout,
        torch.arange(texts).repeat(images),
        torch.arange(images).repeat_interleave(texts),
        images,
    )
    fused = student.fuse(pairs.expand(tokens), pairs, student.encode_image(make_images(images)))
    return model.itm_head(pairs.first(fused))[:, 1].view(images, texts)


@pytest.mark.parametrize("workspace", [1, 120_000, 1 << 28])
@pytest.mark.parametrize("reference", [False, True])
def test_all_candidates_give_all_scores(workspace, reference):
    """However pairs are divided into calls, and so however often keys and values are used again."""
    model = make(pretraining=False).eval()
    wanted = every_pair(model)
    model.use_reference(reference)
    found = albef_rerank.rerank(model, *sets(model), k=100, workspace_bytes=workspace)
    torch.testing.assert_close(found.image_to_text, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.text_to_image, wanted.T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("k", [1, 3])
def test_candidates_are_the_best_by_features(k):
    model = make(pretraining=False).eval()
    images, texts = sets(model)
    found, wanted = albef_rerank.rerank(model, images, texts, k), every_pair(model)
    similarity = images.features @ texts.features.T
    for scores, all_scores, sims in (
        (found.image_to_text, wanted, similarity),
        (found.text_to_image, wanted.T, similarity.T),
    ):
        chosen = torch.zeros(sims.shape, dtype=torch.bool).scatter(1, sims.topk(k).indices, True)
        expected = all_scores.masked_fill(~chosen, -100)
        torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)


def test_keys_and_values_are_projected_once_and_pairs_fused_once():
    model = make(pretraining=False).eval()
    images, texts = sets(model)
    projected, fused = [], []
    for layer in model.student.text_encoder.fusion:
        layer.crossattention.self.value.register_forward_hook(
            lambda _, arguments, __: projected.append(len(arguments[0]))
        )
    model.itm_head.register_forward_hook(lambda _, arguments, __: fused.append(len(arguments[0])))
    for workspace in (1, 1 << 28):
        projected.clear(), fused.clear()
        albef_rerank.rerank(model, images, texts, 100, workspace_bytes=workspace)
        assert sum(projected) == 2 * COUNTS[0] and sum(fused) == COUNTS[0] * COUNTS[1]
        assert len(fused) == (35 if workspace == 1 else 1)


def test_recalls_from_the_scores():
    model = make(pretraining=False).eval()
    scores = albef_rerank.rerank(model, *sets(model), k=100)
    owner = torch.tensor([0, 0, 1, 2, 3, 3, 4])
    found = retrieval_from_scores(*scores, owner, ks=(1, 2), workspace_bytes=1)
    order = scores.image_to_text.argsort(1, descending=True)
    best = (owner[order] == torch.arange(5)[:, None]).int().argmax(1)
    for k in (1, 2):
        assert found["image_to_text"][f"R@{k}"] == pytest.approx((best < k).double().mean().item())
    order = scores.text_to_image.argsort(1, descending=True)
    place = (order == owner[:, None]).int().argmax(1)
    assert found["text_to_image"]["R@1"] == pytest.approx((place < 1).double().mean().item())


def test_recalls_of_what_was_not_scored():
    """A right answer outside of the candidates ties with all others there and comes last."""
    scores = torch.full((3, 3), -100.0)
    scores[0, 1] = 1.0
    found = retrieval_from_scores(scores, scores, ks=(1, 2, 3))
    assert found["text_to_image"]["R@2"] == 0 and found["text_to_image"]["R@3"] == 1
    with pytest.raises(ValueError, match="image_to_text must be"):
        retrieval_from_scores(scores, scores[:2])
    with pytest.raises(TypeError, match="text_to_image must be floating"):
        retrieval_from_scores(scores.long(), scores)


def scores_on(rank, k):
    import torch.distributed as dist

    model = make(pretraining=False).eval()
    done = []
    model.itm_head.register_forward_hook(lambda _, arguments, __: done.append(len(arguments[0])))
    scores = albef_rerank.rerank(model, *sets(model), k=k, group=dist.group.WORLD)
    return [t.tolist() for t in scores], sum(done)


def unlike(rank, k=3, turned=False):
    """Rank 1 calls with another k, or with the texts of other features."""
    import torch.distributed as dist

    model = make(pretraining=False).eval()
    images, texts = sets(model)
    if turned and rank == 1:
        texts = texts._replace(features=texts.features.flip(0))
    albef_rerank.rerank(model, images, texts, k=k if rank else 3, group=dist.group.WORLD)


@pytest.fixture(scope="module")
def ranks():
    jobs = {
        "scores": (scores_on, 3),
        "bad k": (unlike, 0),
        "other k": (unlike, 2),
        "other texts": (unlike, 3, True),
    }
    return run(2, several, jobs)


@pytest.mark.parametrize(
    "name, message",
    [
        ("bad k", "RuntimeError: rank 1 of the group: ValueError: k: expected a whole number"),
        ("other k", "RuntimeError: pairs: expected the same on every rank"),
        ("other texts", "RuntimeError: .*expected the same on every rank"),
    ],
)
def test_what_differs_between_ranks_is_raised_by_all(ranks, name, message):
    for results in ranks:
        assert re.match(message, results[name]), results[name]


def test_ranks_share_the_pairs(ranks):
    model = make(pretraining=False).eval()
    alone = albef_rerank.rerank(model, *sets(model), k=3)
    (first, done), (second, others) = (results["scores"] for results in ranks)
    assert first == second and done > 0 and others > 0
    assert (
        done + others == (alone.image_to_text > -100).logical_or(alone.text_to_image.T > -100).sum()
    )
    for ours, theirs in zip(alone, first, strict=True):
        torch.testing.assert_close(torch.tensor(theirs), ours, rtol=1e-5, atol=1e-6)


def test_faults_of_reranking():
    model = make(pretraining=False)
    with pytest.raises(RuntimeError, match="evaluation mode"):
        albef_rerank.encode_images(model, [make_images(2)])
    images, texts = sets(model.eval())
    with pytest.raises(ValueError, match="k: expected"):
        albef_rerank.rerank(model, images, texts, 0)
    with pytest.raises(ValueError, match="images: expected one or more"):
        albef_rerank.rerank(model, images._replace(features=images.features[:0]), texts, 1)
    with pytest.raises(ValueError, match="images: expected features of each of 5"):
        albef_rerank.rerank(model, images._replace(features=images.features[:2]), texts, 1)
    with pytest.raises(ValueError, match="texts: expected 36 tokens"):
        albef_rerank.rerank(model, images, texts._replace(tokens=texts.tokens[:3]), 1)
