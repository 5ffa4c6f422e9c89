"""Random steps of the momentum-contrastive loss, and its results three ways."""

import itertools
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from fastvlp.ops import MomentumContrastive
from fastvlp_tests.tolerance import assert_as_accurate, epsilon

NAMES = ("loss", "image", "text", "temperature")


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


def fitted(batch, queue, dim, scale, cosine, alpha, seed=0):
    """float32 pairs whose logits are `scale` times `cosine`, far above those of the negatives."""
    g = torch.Generator().manual_seed(seed)

    def normal(rows):
        return F.normalize(torch.randn(rows, dim, generator=g, dtype=torch.float64), dim=1)

    def near(x):
        other = normal(len(x))
        other = F.normalize(other - (other * x).sum(1, keepdim=True) * x, dim=1)
        return cosine * x + (1 - cosine**2) ** 0.5 * other

    image = normal(batch)
    features = (image, *(near(image) for _ in range(3)), normal(queue), normal(queue))
    return Step(tuple(t.float() for t in features), 1 / scale, alpha, None, None, None, seed)


def plain(
    image, text, image_momentum, text_momentum, image_queue, text_queue, temperature, alpha,
    *, ids=None, queue_ids=None, queue_length=None, seed=None,
):  # fmt: skip
    """The loss as one would write it: lse - sum of targets times logits. No hard negatives."""

    def direction(student, teacher, keys, queue):
        keys = torch.cat([keys, queue])
        logits, own = student @ keys.T / temperature, torch.arange(len(student))
        target = alpha * (teacher @ keys.T / temperature.detach()).softmax(1)
        target[own, own] += 1 - alpha
        return (logits.logsumexp(1) - (target * logits).sum(1)).mean()

    forth = direction(image, image_momentum, text_momentum, text_queue)
    back = direction(text, text_momentum, image_momentum, image_queue)
    return MomentumContrastive((forth + back) / 2, None, None)


def check_fitted(run):
    """`run(step)` gives (loss, its three gradients) of steps from badly to very well fitted."""
    small = 0
    for scale, cosine, alpha in itertools.product(
        (1.0, 3.0, 10.0, 30.0, 100.0), (1.0, 0.9, 0.65, 0.0), (0.0, 0.4)
    ):
        step = fitted(8, 24, 32, scale, cosine, alpha)
        exact = step.run(plain, torch.float64)[:4]
        if exact[0] < 1e-8:
            continue
        eager = step.run(plain)[:4]
        # The logits themselves are rounded: by this, relatively, their exponentials.
        rounding = 2 * epsilon(torch.float32) * (scale + 1)
        is_small = exact[0] < 1e-4
        small += is_small
        for name, our, near, true in zip(NAMES, run(step), eager, exact, strict=False):
            floor = rounding * true.norm().item()
            at = f"{name} at scale {scale}, cosine {cosine}, alpha {alpha}"
            assert_as_accurate(at, our, near, true, floor)
            if is_small:
                error, plain_error = ((t.double() - true).norm().item() for t in (our, near))
                assert error <= plain_error / 10, f"{at}: {error:.1e} against {plain_error:.1e}"
    assert small >= 2
