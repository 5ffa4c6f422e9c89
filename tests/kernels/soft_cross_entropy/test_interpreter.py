"""The Triton pass of soft cross entropy against float64: interpreted, or on a GPU."""

import pytest
import torch
from fastvlp_tests.tolerance import assert_as_accurate, epsilon
from hypothesis import given, settings
from hypothesis import strategies as st

SINGLE = epsilon(torch.float32)
NAMES = ("logits", "bias", "teacher", "teacher_bias", "labels", "alpha")


def draw(rows, cols, device, *, scale=1.0, bias=True, teacher=True, offset=0.0, seed=0):
    """Arguments of the pass, with ignored labels among them and rows that are padded."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    def logits():
        wide = torch.full((rows, cols + 5), torch.nan)
        wide[:, :cols] = scale * normal(rows, cols) + offset
        return wide[:, :cols]

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
    device = sampled["logits"].device
    shape = (rows, cols) if gradient else (0, 0)
    return run_kernel(
        "soft_cross_entropy.rows", "soft_cross_entropy_rows", *sampled.values(), -100,
        torch.empty(rows, device=device), torch.empty(shape, dtype=dtype, device=device),
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


@settings(max_examples=25)
@given(
    rows=st.sampled_from([1, 2, 7]),
    cols=st.sampled_from([1, 31, 32, 33, 64, 100]),
    # The interpreter truncates where it should round to bfloat16: the compiled kernel alone does.
    dtype=st.sampled_from([torch.float32, torch.float16]),
    scale=st.sampled_from([0.1, 3.0, 30.0]),
    offset=st.sampled_from([0.0, -50.0, 2000.0]),
    bias=st.booleans(),
    teacher=st.booleans(),
    seed=st.integers(0, 3),
)
def test_matches_float64(run_kernel, device, rows, cols, dtype, **drawn):
    check(run_kernel, draw(rows, cols, device, **drawn), dtype)


def test_losses_alone_are_the_same(run_kernel, device):
    sampled = draw(5, 70, device)
    both, alone = run(run_kernel, sampled), run(run_kernel, sampled, gradient=False)
    assert torch.equal(both[0], alone[0]) and alone[1].numel() == 0


def test_gradient_may_replace_the_logits(run_kernel, device):
    sampled = draw(6, 75, device)
    expected = run(run_kernel, sampled)
    logits = sampled["logits"].clone()
    losses, gradient = run_kernel(
        "soft_cross_entropy.rows", "soft_cross_entropy_rows", logits,
        *(sampled[name] for name in NAMES[1:]), -100, torch.empty(6, device=device), logits,
    )  # fmt: skip
    assert torch.equal(losses, expected[0]) and torch.equal(gradient, expected[1])


def test_impossible_tokens(run_kernel, device):
    # A whole block is ruled out by both, and one more token by the teacher alone.
    sampled = draw(4, 90, device)
    sampled["labels"].fill_(5)
    sampled["bias"][32:64] = -torch.inf
    sampled["teacher_bias"][32:64] = -torch.inf
    sampled["teacher_bias"][70] = -torch.inf
    losses, gradient = run(run_kernel, sampled)
    kept = [*range(32), *range(64, 90)]
    small = {k: t[..., kept] if t.shape[-1:] == (90,) else t for k, t in sampled.items()}
    exact = formula(small, torch.float64)
    torch.testing.assert_close(losses.double(), exact[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient[:, kept].double(), exact[1], rtol=1e-4, atol=1e-7)
    assert not gradient[:, 32:64].any()


def test_a_label_out_of_range_gives_nan_in_its_row_alone(run_kernel, device):
    sampled = draw(5, 40, device)
    sampled["labels"][0], sampled["labels"][3] = 40, -7
    losses, gradient = run(run_kernel, sampled)
    bad = torch.tensor([True, False, False, True, False], device=device)
    assert torch.equal(losses.isnan(), bad) and torch.equal(gradient.isnan().all(1), bad)
    assert torch.equal(gradient.isnan().any(1), bad)


def test_nan_stays_in_its_row(run_kernel, device):
    sampled = draw(5, 40, device)
    sampled["logits"][1, 33] = torch.nan
    losses, gradient = run(run_kernel, sampled)
    bad = torch.tensor([False, True, False, False, False], device=device)
    assert torch.equal(losses.isnan(), bad) and torch.equal(gradient.isnan().any(1), bad)


def test_no_rows(run_kernel, device):
    losses, gradient = run(run_kernel, draw(0, 40, device))
    assert losses.shape == (0,) and gradient.shape == (0, 40)


def test_unusable_arguments_say_why(run_kernel, device):
    sampled = draw(3, 40, device)
    with pytest.raises(ValueError, match="logits must be float32, got torch.float16"):
        run(run_kernel, {**sampled, "logits": sampled["logits"].half()})
    with pytest.raises(ValueError, match=r"teacher must be \(3, 40\) with unit stride"):
        run(run_kernel, {**sampled, "teacher": sampled["teacher"][:, :30]})
