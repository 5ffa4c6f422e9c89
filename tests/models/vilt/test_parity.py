"""The same weights give the same outputs and losses as in transformers' ViLT classes."""

import pytest
import torch
import transformers
from fastvlp_tests.vilt_cases import LENGTHS, PATCH, images, labels, mask_of, perturb, tokens

from fastvlp.models.checkpoints import load_vilt
from fastvlp.models.vilt.patches import ImageBatch, nonzero_pixels

SECOND_SIZES = ((2, 3), (4, 1), (3, 5), (1, 1))


def peer_of(name, **changes):
    config = transformers.ViltConfig(
        vocab_size=60, max_position_embeddings=12, hidden_size=48, num_hidden_layers=2,
        num_attention_heads=3, intermediate_size=192, image_size=4 * PATCH, patch_size=PATCH,
        **changes,
    )  # fmt: skip
    return perturb(getattr(transformers, name)(config))


def pair(name, overrides=None, **changes):
    peer = peer_of(name, **changes)
    settings = peer.config.to_dict()
    ours, report = load_vilt(peer.state_dict(), settings=settings, **(overrides or {}))
    assert not report.missing and not report.unused, report
    return ours, peer


def text_mask():
    return (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()


def theirs(batch):
    return dict(
        input_ids=tokens(), attention_mask=text_mask(), pixel_values=batch.images,
        pixel_mask=mask_of(batch).long(),
    )  # fmt: skip


def assert_equal(got, expected):
    assert got.shape == expected.shape
    assert (got - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("reference", [False, True])
@torch.no_grad()
def test_features(reference):
    ours, peer = pair("ViltModel")
    ours.use_reference(reference)
    batch = images()
    out = peer(**theirs(batch))
    words, patches, pooled = ours(tokens(), batch, text_mask())
    size = words.shape[1]
    real = text_mask().bool()
    assert_equal(words[real], out.last_hidden_state[:, :size][real])
    for i, (height, width) in enumerate(batch.sizes):
        # Theirs come in a random order where an image has no padding.
        got, expected = patches[i, : 1 + height * width], out.last_hidden_state[i, size:]
        order = torch.cdist(got, expected).argmin(1)
        assert order[0] == 0 and len(order.unique()) == len(got)
        assert_equal(got, expected[order])
    assert_equal(pooled, out.pooler_output)


@torch.no_grad()
def test_features_of_images_that_lose_patches_to_zero_detection():
    """A pixel mask with holes, which the original derives from black pixels."""
    ours, peer = pair("ViltModel")
    batch = images()
    batch.images.mul_(mask_of(batch)[:, None])
    batch.images[0, :, 2 * PATCH, 3 * PATCH] = 0
    batch.images[1, :, 0, 3 * PATCH] = 0
    mask = nonzero_pixels(batch.images)
    out = peer(**theirs(batch) | {"pixel_mask": mask.long()})
    tokens_of = ours.embed_images(ImageBatch(batch.images, mask))
    assert tokens_of.lengths == (15, 16, 3, 11)
    assert_equal(ours(tokens(), ImageBatch(batch.images, mask), LENGTHS)[2], out.pooler_output)


@torch.no_grad()
def test_random_subsets_hold_the_same_kind_of_patches():
    """Both draw as many of the same embedded patches, without repetition."""
    ours, peer = pair("ViltModel", max_image_length=6)
    batch = images()
    theirs_rows, mask, _ = peer.embeddings.visual_embed(
        batch.images, mask_of(batch).long(), max_image_length=6
    )
    everything = ours.embed_images(batch)
    sampled = ours.train().embed_images(batch, seed=4)
    assert sampled.lengths == (7, 7, 3, 7)
    assert mask.sum(1).tolist() == list(sampled.lengths)
    for whole, some, their in zip(
        everything.rows.split(everything.lengths),
        sampled.rows.split(sampled.lengths),
        (rows[real.bool()] for rows, real in zip(theirs_rows, mask, strict=True)),
        strict=True,
    ):
        for rows in (some, their):
            nearest = torch.cdist(rows, whole).min(1)
            assert nearest.values.max() < 1e-4
            assert len(nearest.indices.unique()) == len(rows)


@pytest.mark.parametrize("reference", [False, True])
@torch.no_grad()
def test_masked_language_modelling(reference):
    ours, peer = pair("ViltForMaskedLM")
    ours.use_reference(reference)
    batch = images()
    out = peer(**theirs(batch), labels=labels())
    sequences = ours.encode(tokens(), ours.embed_images(batch), LENGTHS)
    assert_equal(ours.mlm_loss(sequences, labels()), out.loss)
    assert_equal(ours.mlm_loss(sequences, labels(), max_masked=20), out.loss)
    real = text_mask().bool()
    logits = ours.mlm_score.logits(sequences.map(ours.transformer.norm).text())
    assert_equal(logits[real], out.logits[real])


@pytest.mark.parametrize("reference", [False, True])
@torch.no_grad()
def test_retrieval(reference):
    ours, peer = pair("ViltForImageAndTextRetrieval")
    ours.use_reference(reference)
    batch = images()
    embedded = ours.embed_images(batch)
    scores = ours.rank_scores(ours.encode(tokens(), embedded, LENGTHS))
    assert_equal(scores, peer(**theirs(batch)).logits[:, 0])
    # Each image with all four texts, the first one its own.
    order = torch.stack([torch.arange(4).roll(-i) for i in range(4)])
    all_pairs = theirs(batch._replace(sizes=[s for s in batch.sizes for _ in range(4)],
                                      images=batch.images.repeat_interleave(4, 0)))  # fmt: skip
    all_pairs["input_ids"] = tokens()[order.flatten()]
    all_pairs["attention_mask"] = text_mask()[order.flatten()]
    expected = peer(**all_pairs).logits.view(4, 4)
    loss = torch.nn.functional.cross_entropy(expected, torch.zeros(4, dtype=torch.int64))
    assert_equal(ours.retrieval_loss(tokens()[order], torch.tensor(LENGTHS)[order], embedded), loss)
    assert_equal(ours.retrieval_loss(tokens()[order], text_mask()[order], embedded), loss)


@pytest.mark.parametrize("reference", [False, True])
@torch.no_grad()
def test_visual_question_answering(reference):
    ours, peer = pair("ViltForQuestionAnswering", num_labels=9)
    ours.use_reference(reference)
    assert ours.config.tasks == ("vqa",) and ours.config.answers == 9
    batch = images()
    targets = torch.rand(4, 9, generator=torch.Generator().manual_seed(0))
    out = peer(**theirs(batch), labels=targets)
    logits = ours.vqa_logits(ours.encode(tokens(), ours.embed_images(batch), LENGTHS))
    assert_equal(logits, out.logits)
    assert_equal(ours.vqa_loss(logits, targets), out.loss)


@pytest.mark.parametrize("reference", [False, True])
@torch.no_grad()
def test_nlvr2(reference):
    ours, peer = pair(
        "ViltForImagesAndTextClassification", num_images=2, num_labels=2, modality_type_vocab_size=3
    )
    ours.use_reference(reference)
    canvas = torch.zeros(4, 2, 3, 4 * PATCH, 5 * PATCH)
    mask = torch.zeros(4, 2, 4 * PATCH, 5 * PATCH)
    both = (images(), images(SECOND_SIZES, seed=9))
    for i, batch in enumerate(both):
        canvas[:, i], mask[:, i] = batch.images, mask_of(batch)
    answers = torch.tensor([0, 1, 1, 0])
    out = peer(
        input_ids=tokens(), attention_mask=text_mask(), pixel_values=canvas, pixel_mask=mask.long(),
        labels=answers,
    )  # fmt: skip
    logits = ours.nlvr2_logits(tokens(), LENGTHS, *(ours.embed_images(batch) for batch in both))
    assert_equal(logits, out.logits)
    assert_equal(ours.nlvr2_loss(logits, answers), out.loss)


@torch.no_grad()
def test_token_classification():
    peer = peer_of("ViltForTokenClassification", num_labels=4)
    ours, report = load_vilt(peer.state_dict(), settings=peer.config.to_dict())
    assert report.missing == ("pooler.dense.bias", "pooler.dense.weight")
    assert ours.config.tasks == ("tokens",)
    batch = images()
    real = text_mask().bool()
    logits = ours.token_logits(ours.encode(tokens(), ours.embed_images(batch), LENGTHS))
    assert_equal(logits[real], peer(**theirs(batch)).logits[real])
