"""Random heads and teachers, and gradients of the three ways to compute a loss."""

from dataclasses import dataclass, fields

import torch


@dataclass
class Case:
    """Arguments of soft_cross_entropy; teacher_* None without a teacher."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    labels: torch.Tensor
    teacher_hidden: torch.Tensor | None = None
    teacher_weight: torch.Tensor | None = None
    teacher_bias: torch.Tensor | None = None
    alpha: float | torch.Tensor = 0.0

    def to(self, dtype) -> "Case":
        def cast(value):
            floating = isinstance(value, torch.Tensor) and value.is_floating_point()
            return value.detach().to(dtype) if floating else value

        return Case(**{f.name: cast(getattr(self, f.name)) for f in fields(self)})

    def call(self, function, **options):
        teacher = {name: getattr(self, name) for name in TEACHER}
        return function(
            self.hidden, self.weight, self.bias, self.labels, **teacher, **options
        )  # fmt: skip


TEACHER = ("teacher_hidden", "teacher_weight", "teacher_bias", "alpha")
LEAVES = ("hidden", "weight", "bias")


def draw(
    rows, width, vocabulary, dtype, device, *, teacher=True, bias=True, scale=1.0, ignored=True,
    master=False, seed=0,
):  # fmt: skip
    """A head whose logits are about `scale` wide; `master`: with float32 weights."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.float32 if master else dtype

    def normal(*shape, size=1.0):
        return size * torch.randn(shape, generator=generator, dtype=torch.float64)

    def place(t, dtype=torch.float32):
        return t.to(device, dtype)

    labels = torch.randint(vocabulary, (rows,), generator=generator)
    if ignored:
        labels[1::3] = -100
    case = Case(
        place(normal(rows, width), dtype),
        place(normal(vocabulary, width, size=scale / width**0.5), weights),
        place(normal(vocabulary)) if bias else None,
        labels.to(device),
    )
    if teacher:
        other = width // 2 + 1
        case.teacher_hidden = place(normal(rows, other), dtype)
        case.teacher_weight = place(normal(vocabulary, other, size=scale / other**0.5), weights)
        case.teacher_bias = place(normal(vocabulary)) if bias else None
        case.alpha = 0.4
    return case


def run(function, case, upstream=None, **options):
    """The loss and its gradients w.r.t. hidden, weight and bias (None where there is none)."""
    leaves = {}
    for name in LEAVES:
        value = getattr(case, name)
        leaves[name] = None if value is None else value.detach().clone().requires_grad_()
    loss = Case(**{**vars(case), **leaves}).call(function, **options)
    (loss if upstream is None else loss * upstream.to(loss.dtype)).sum().backward()
    return loss.detach(), *(None if t is None else t.grad for t in leaves.values())
