"""Drawn steps of the momentum-contrastive loss, and its results three ways."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Step:
    """The arguments of one call; features in the order of the operator."""

    features: tuple[torch.Tensor, ...]
    temperature: float
    alpha: float | torch.Tensor
    ids: torch.Tensor | None
    queue_ids: torch.Tensor | None
    queue_length: int | None
    seed: int

    def run(self, function, dtype=None, upstream=1.0):
        """(loss, d_image, d_text, d_temperature, negative texts, negative images)."""
        dtype = dtype or self.features[0].dtype
        features = [t.detach().to(dtype) for t in self.features]
        low = torch.float64 if dtype == torch.float64 else torch.float32
        temperature = torch.tensor(self.temperature, dtype=low, device=features[0].device)
        leaves = [t.clone().requires_grad_() for t in (*features[:2], temperature)]
        result = function(
            *leaves[:2], *features[2:], leaves[2], self.alpha, ids=self.ids,
            queue_ids=self.queue_ids, queue_length=self.queue_length, seed=self.seed,
        )  # fmt: skip
        (upstream * result.loss).backward()
        return result.loss.detach(), *(leaf.grad for leaf in leaves), *result[1:]

    def arguments(self):
        """Of the kernels, tensors throughout."""
        device = self.features[0].device
        empty = torch.empty(0, dtype=torch.int64, device=device)
        length = len(self.features[4]) if self.queue_length is None else self.queue_length
        return (
            *self.features,
            empty if self.ids is None else self.ids,
            empty if self.queue_ids is None else self.queue_ids,
            torch.tensor(length, device=device),
            torch.tensor(self.temperature, device=device),
            torch.as_tensor(self.alpha, dtype=torch.float32, device=device),
            torch.tensor(self.seed, device=device),
        )

    def with_features(self, **by_index):
        features = list(self.features)
        for index, t in by_index.items():
            features[int(index[1:])] = t
        return replace(self, features=tuple(features))


def draw(
    batch, queue, dim, dtype, device, *, temperature=0.07, alpha=0.4, kinds=0, length=None,
    norm=1.0, strided=False, seed=0,
):  # fmt: skip
    """Correlated pairs. `kinds` ids are shared among them (0: none); queue rows past `length` are
    NaN; `strided` pads rows with NaN."""
    g = torch.Generator().manual_seed(seed)
    image = torch.randn(batch, dim, generator=g, dtype=torch.float64)
    students = [image, image + torch.randn(batch, dim, generator=g, dtype=torch.float64)]
    teachers = [t + 0.5 * torch.randn(batch, dim, generator=g, dtype=torch.float64)
                for t in students]  # fmt: skip
    queues = [torch.randn(queue, dim, generator=g, dtype=torch.float64) for _ in range(2)]
    features = []
    for t in (*students, *teachers, *queues):
        t = norm * F.normalize(t, dim=1)
        wide = torch.full((len(t), dim + 3 * strided), torch.nan, dtype=dtype, device=device)
        wide[:, :dim] = t.to(device, dtype)
        features.append(wide[:, :dim])
    for t in features[4:] if length is not None else ():
        t[length:] = torch.nan
    ids = [torch.randint(kinds, (n,), generator=g).to(device) for n in (batch, queue)] if kinds \
        else [None, None]  # fmt: skip
    return Step(tuple(features), temperature, alpha, *ids, length, seed)
