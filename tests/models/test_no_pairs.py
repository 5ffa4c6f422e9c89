"""Batches without pairs: losses of 0, and a gradient of zeros for every parameter.

What a rank passes through a wrapped model that has to communicate with the others.
"""

import pytest
import torch
from fastvlp_tests.tiny_pretraining import ALBEF, VILT

from fastvlp.models import albef, clip, vilt
from fastvlp.models.albef.tasks import classification as albef_classifier
from fastvlp.models.albef.tasks import retrieval as albef_retrieval
from fastvlp.models.albef.tasks import vqa as albef_vqa
from fastvlp.models.vilt.patches import ImageBatch

IDS, NUMBERS = torch.empty(0, 6, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
IMAGES = torch.empty(0, 3, 8, 8)


def of_clip(reference):
    config = clip.ClipConfig(8, 8, 4, 8, 2, 2, 8, 2, 2, context_length=6, vocab_size=32)
    model = clip.Clip(config).use_reference(reference)
    images, texts, scale = model(IMAGES, IDS)
    return model, images.sum() + texts.sum() + 0 * scale


def of_vilt(reference):
    model = vilt.Vilt(VILT).use_reference(reference)
    masked = ImageBatch(IMAGES, torch.empty(0, 8, 8, dtype=torch.bool))
    losses = model.pretraining_losses(IDS, [], IDS, IDS, masked, masked)
    assert [loss.item() for loss in losses.values()] == [0] * 4
    return model, losses["loss"]


def of_albef(reference):
    model = albef.Albef(ALBEF).use_reference(reference)
    losses = model(IMAGES, IDS, IDS.bool(), IDS, IDS, ids=NUMBERS)
    assert [loss.item() for loss in losses] == [0] * 4 and int(model.queue.position) == 0
    return model, losses.total


def of_retrieval(reference):
    model = albef_retrieval.AlbefRetrieval(ALBEF).use_reference(reference)
    losses = model(IMAGES, IDS, IDS.bool(), NUMBERS)
    assert [loss.item() for loss in losses] == [0] * 3
    return model, losses.total


def of_classifier(reference):
    model = albef_classifier.entailment("tiny").use_reference(reference)
    return model, model(torch.empty(0, 3, 64, 64), IDS, IDS.bool(), NUMBERS)


def of_answers(reference):
    model = albef_vqa.create("tiny").use_reference(reference)
    none = IDS, IDS.bool()
    return model, model(torch.empty(0, 3, 64, 64), *none, *none, NUMBERS, torch.empty(0))


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize(
    "make", [of_clip, of_vilt, of_albef, of_retrieval, of_classifier, of_answers]
)
def test_zero_and_zero_gradients(make, reference):
    model, loss = make(reference)
    assert loss.item() == 0
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and not parameter.grad.any(), name
