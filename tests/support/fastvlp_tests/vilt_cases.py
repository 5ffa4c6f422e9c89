"""Small ViLT models and batches with images of several sizes and texts of several lengths."""

import torch

from fastvlp.models.vilt import Vilt, ViltConfig
from fastvlp.models.vilt.patches import ImageBatch

PATCH = 8
LENGTHS = (7, 3, 10, 5)
SIZES = ((3, 5), (4, 4), (1, 2), (2, 5))
FALSE_SIZES = ((4, 3), (2, 2), (3, 1), (1, 3))
SMALL = dict(
    image_size=4 * PATCH, patch_size=PATCH, width=48, layers=2, heads=3, vocab_size=60,
    context_length=12, answers=9, token_labels=4, dropout=0.1,
)  # fmt: skip


def perturb(model, scale=0.1, seed=0):
    """No parameter keeps a value that hides a mistake, such as a bias of zero."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return model.eval()


def small(**changes):
    return perturb(Vilt(ViltConfig(**(SMALL | changes))))


def images(sizes=SIZES, seed=1, dtype=torch.float32):
    """A canvas as large as needed, with pixels everywhere."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (PATCH * max(side) for side in zip(*sizes, strict=True))
    pixels = torch.randn(len(sizes), 3, rows, columns, generator=generator).to(dtype)
    return ImageBatch(pixels, sizes=sizes)


def mask_of(batch):
    """The pixel mask that says the same as the sizes."""
    rows, columns = (torch.arange(side) for side in batch.images.shape[2:])
    sides = PATCH * torch.tensor(batch.sizes)
    return (rows[:, None] < sides[:, 0, None, None]) & (columns < sides[:, 1, None, None])


def tokens(lengths=LENGTHS, seed=2, padded=None):
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), padded or max(lengths))
    return torch.randint(1, SMALL["vocab_size"], shape, generator=generator)


def labels(lengths=LENGTHS, seed=3, padded=None):
    """About a third of the words are to be predicted, none in the second text."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), padded or max(lengths))
    chosen = torch.rand(shape, generator=generator) < 0.3
    chosen &= torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    chosen[1] = False
    return torch.where(chosen, tokens(lengths, seed, padded), -100)
