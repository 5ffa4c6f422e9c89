"""Small ALBEF models and batches."""

import torch

from fastvlp.models import albef

LENGTHS = [12, 5, 7, 9]


def make(seed=0, **overrides):
    """A tiny model without dropout, no parameter at a value that hides a mistake, momentum encoder
    apart."""
    torch.manual_seed(seed)
    model = albef.create("tiny", **(dict(dropout=0.0, attention_dropout=0.0) | overrides))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.temp.data.fill_(0.07)
    if model.momentum is not None:
        model.refresh_copy()
    return model


def batch(config, lengths=LENGTHS, seed=1):
    """Arguments of `pretraining_loss`, alpha included."""
    generator = torch.Generator().manual_seed(seed)
    count, length = len(lengths), max(LENGTHS)
    side = config.image_size
    images = torch.randn(count, 3, side, side, generator=generator)
    ids = torch.randint(4, config.vocab_size, (count, length), generator=generator)
    mask = torch.arange(length) < torch.tensor(lengths)[:, None]
    chosen = (torch.rand(count, length, generator=generator) < 0.3) & mask
    chosen[:, 0] = False
    chosen[0, 1] = True
    labels = torch.where(chosen, ids, -100)
    masked = torch.where(chosen, 3, ids)
    return [images, ids, mask, masked, labels, 0.4]


def step(model, arguments, **kwargs):
    """Losses, and the gradient of every parameter of the model that has one."""
    model.zero_grad()
    losses = model.pretraining_loss(*arguments, **(dict(update=False, seed=3) | kwargs))
    losses.total.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {k: v.detach() for k, v in losses._asdict().items()} | grads
