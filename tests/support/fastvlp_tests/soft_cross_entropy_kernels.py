"""Arguments of the pass of soft cross entropy over logits, and its check against float64."""

import torch

from fastvlp_tests.tolerance import assert_as_accurate, epsilon

SINGLE = epsilon(torch.float32)
NAMES = ("logits", "bias", "teacher", "teacher_bias", "labels", "alpha")


def matrix(rows, cols, align, dtype=torch.float32):
    """NaN, with rows at multiples of `align` elements."""
    return torch.full((rows, -(-cols // align) * align), torch.nan, dtype=dtype)[:, :cols]


def draw(
    rows, cols, device, *, scale=1.0, bias=True, teacher=True, offset=0.0, seed=0, align=16
):  # fmt: skip
    """Arguments of the pass, with ignored labels among them and rows that are padded."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    def logits():
        return matrix(rows, cols, align).copy_(scale * normal(rows, cols) + offset)

    labels = torch.randint(cols, (rows,), generator=generator)
    labels[2::3] = -100
    sampled = (
        logits(),
        normal(cols) if bias else torch.empty(0),
        logits() if teacher else torch.empty(0, 0),
        normal(cols) if bias and teacher else torch.empty(0),
        labels,
        torch.tensor(0.4),
    )
    return {name: t.to(device) for name, t in zip(NAMES, sampled, strict=True)}


def run(run_kernel, sampled, dtype=torch.float32, gradient=True):
    rows, cols = sampled["logits"].shape
    device, length = sampled["logits"].device, sampled["logits"].stride(0)
    into = torch.empty(0, 0, dtype=dtype)
    if gradient:
        into = matrix(rows, cols, max(1, length), dtype)
    return run_kernel(
        "soft_cross_entropy.rows", "soft_cross_entropy_rows", *sampled.values(), -100,
        torch.empty(rows, device=device), into.to(device),
    )  # fmt: skip


def formula(sampled, dtype):
    """Losses and derivatives by plain PyTorch in `dtype`."""
    values = {k: t.to(dtype) if t.is_floating_point() else t for k, t in sampled.items()}

    def biased(logits, bias):
        return logits + bias if bias.numel() else logits

    z = biased(values["logits"], values["bias"])
    labels, keep = values["labels"], values["labels"] != -100
    log_p, alpha = z.log_softmax(-1), values["alpha"]
    hot = torch.nn.functional.one_hot(labels.clamp(min=0), z.shape[1]).to(dtype)
    target = hot
    if values["teacher"].numel():
        soft = biased(values["teacher"], values["teacher_bias"]).softmax(-1)
        target = (1 - alpha) * hot + alpha * soft
    losses = torch.where(keep, -(target * log_p).sum(-1), 0)
    return losses, torch.where(keep[:, None], log_p.exp() - target, 0)


def check(run_kernel, sampled, dtype=torch.float32):
    ours = run(run_kernel, sampled, dtype)
    eager, exact = formula(sampled, torch.float32), formula(sampled, torch.float64)
    size = sampled["logits"].abs().max().item() + 10
    stored = 2.0**14 if dtype == torch.float16 else 1.0
    losses, gradient = ours[0], ours[1].float() / stored
    assert ours[1].dtype == dtype
    floor = SINGLE * size
    assert_as_accurate("losses", losses, eager[0], exact[0], floor * len(losses) ** 0.5)
    # Rounding of p and of what is stored, an element at a time.
    floor = (floor + epsilon(dtype)) * exact[1].norm().item()
    assert_as_accurate("gradient", gradient, eager[1], exact[1], floor)
    return ours
