"""Small recipes, and what batches of the loader hold, for the tests of it."""

import torch

from fastvlp.data.images.recipes import recipe

SMALL = {
    "clip_train": recipe("clip_train", size=32),
    "clip_eval": recipe("clip_eval", size=32),
    "albef_pretrain": recipe("albef_pretrain", size=32),
    "albef_eval": recipe("albef_eval", size=32),
    "vilt_finetune": recipe("vilt_finetune", shorter=64, longer=106),
    "vilt_eval": recipe("vilt_eval", shorter=64, longer=106),
}


def lengths(captions):
    return torch.tensor([len(caption) for caption in captions])


def content(batches):
    """Each sample's index, pixels and caption, in order."""
    found = []
    for batch in batches:
        rows = zip(batch.index.tolist(), batch.images, batch.captions, strict=True)
        found += [(i, image.numpy().tobytes(), caption) for i, image, caption in rows]
    return found


def indices(batches):
    return [i for batch in batches for i in batch.index.tolist()]
