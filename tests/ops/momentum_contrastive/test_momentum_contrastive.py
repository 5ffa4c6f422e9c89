"""momentum_contrastive against its float64 reference, over everything a trainer may pass."""

import math

import pytest
import torch
import torch.nn.functional as F
from fastvlp_tests.momentum_cases import NAMES, check_fitted, draw
from fastvlp_tests.tolerance import assert_as_accurate, epsilon
from hypothesis import given
from hypothesis import strategies as st

from fastvlp.ops import momentum_contrastive, momentum_contrastive_reference
from fastvlp.ops.momentum_contrastive.checks import prepare
from fastvlp.ops.momentum_contrastive.register import plan

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ISAS = torch.ops.fastvlp.cpu_instruction_sets().split(",")


def reference(*args, ids, queue_ids, queue_length, seed):
    """The reference under the operator's own signature."""
    # torch's bfloat16 matmuls read what pads the rows: 0 * NaN.
    args = [t.contiguous() if isinstance(t, torch.Tensor) else t for t in args]
    inputs = prepare(*args, ids, queue_ids, queue_length, seed)
    return momentum_contrastive_reference(*inputs.tensors())


def check(step, upstream=1.0):
    ours = step.run(momentum_contrastive, upstream=upstream)
    eager = step.run(reference, upstream=upstream)
    exact = step.run(reference, torch.float64, upstream)
    dtype, batch = step.features[0].dtype, len(step.features[0])
    single = epsilon(torch.float32)
    length = len(step.features[4]) if step.queue_length is None else step.queue_length
    keys = torch.cat([*step.features[2:4], *(t[:length] for t in step.features[4:])]).double()
    longest, student = keys.norm(dim=1).max().item(), torch.cat(step.features[:2]).double()
    highest = student.norm(dim=1).max().item() * longest / step.temperature
    rounding = single * (highest + math.log(len(keys)))
    # What a gradient's terms, of weights 1 at most against each key, lose to rounding.
    share = upstream / (batch * step.temperature) * longest
    terms = share * math.sqrt(batch) * (rounding + single)
    if dtype != torch.float32:  # weights of this dtype, of which p = 1 may be one
        terms += share * math.sqrt(batch) * epsilon(dtype)
    floors = {
        "loss": rounding,
        "image": terms + epsilon(dtype) * exact[1].norm().item(),
        "text": terms + epsilon(dtype) * exact[2].norm().item(),
        "temperature": terms * student.norm().item() / step.temperature,
    }
    for name, our, near, true in zip(NAMES, ours, eager, exact, strict=False):
        assert_as_accurate(name, our, near, true, floors[name])
    assert ours[0].dtype == torch.float32 and ours[0].shape == ()
    assert ours[1].dtype == ours[2].dtype == dtype
    for sampled, known in zip(ours[4:], exact[4:], strict=True):
        assert sampled.dtype == torch.int64 and sampled.shape == (batch,)
        # Noise and logits are rounded: two candidates may change places, but hardly ever.
        assert (sampled != known).sum() <= 1
    return ours


@given(
    batch=st.sampled_from([1, 2, 8, 9, 16, 17, 31, 32, 33, 70]),
    queue=st.sampled_from([0, 1, 31, 32, 100, 301]),
    dim=st.sampled_from([1, 7, 16, 33, 64, 130]),
    dtype=st.sampled_from(DTYPES),
    temperature=st.sampled_from([0.01, 0.07, 1.0]),
    alpha=st.sampled_from([0.0, 0.4, 1.0]),
    kinds=st.sampled_from([0, 1, 7, 200]),
    part=st.sampled_from([None, 0.0, 0.5]),
    norm=st.sampled_from([1.0, 0.05, 3.0]),
    strided=st.booleans(),
    seed=st.integers(0, 5),
)
def test_matches_float64(device, batch, queue, dim, dtype, part, seed, **sampled):
    length = None if part is None else int(queue * part)
    step = draw(batch, queue, dim, dtype, device, length=length, seed=seed, **sampled)
    check(step, 0.7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(monkeypatch, dtype, isa):
    monkeypatch.setenv("FASTVLP_CPU_ISA", isa)
    check(draw(3, 50, 1, dtype, "cpu"))
    # Whole panels of rows and their teachers, one row more, and none of a teacher.
    for batch, alpha in ((8, 0.4), (9, 0.4), (16, 0.0), (17, 0.4), (40, 1.0)):
        check(draw(batch, 70, 33, dtype, "cpu", alpha=alpha, kinds=6))
    check(draw(130, 700, 67, dtype, "cpu", kinds=40, length=650))
    check(draw(64, 3000, 256, dtype, "cpu"))


@pytest.mark.parametrize("norm, upstream", [(1e-33, 1.0), (1e-33, 1e6), (1e3, 1e-30), (1.0, 1e-33)])
def test_extreme_magnitudes_on_every_instruction_set(monkeypatch, norm, upstream):
    # Products of bfloat16 parts flush what is small: features and weights have to be raised.
    step = draw(6, 500, 70, torch.float32, "cpu", norm=norm, temperature=max(0.07, norm**2))
    for isa in ISAS:
        monkeypatch.setenv("FASTVLP_CPU_ISA", isa)
        ours = step.run(momentum_contrastive, upstream=upstream)
        eager = step.run(reference, upstream=upstream)
        exact = step.run(reference, torch.float64, upstream)
        for name, our, near, true in zip(NAMES[:3], ours, eager, exact, strict=False):
            floor = 4 * epsilon(torch.float32) * true.norm().item()
            assert_as_accurate(f"{isa} {name}", our, near, true, floor)


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_any_number_of_threads(device, threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        check(draw(33, 900, 40, torch.float32, device, kinds=30))
    finally:
        torch.set_num_threads(before)


def albef_step(image, text, image_m, text_m, image_queue, text_queue, temperature, alpha):
    """One ITC step as ALBEF takes it: queues of columns, concatenated keys, soft targets."""
    with torch.no_grad():
        all_images = torch.cat([image_m.T, image_queue.T], 1)
        all_texts = torch.cat([text_m.T, text_queue.T], 1)
        one_hot = torch.zeros(len(image), all_images.shape[1], dtype=image.dtype)
        one_hot.fill_diagonal_(1)
        soft_i = F.softmax(image_m @ all_texts / temperature, 1)
        soft_t = F.softmax(text_m @ all_images / temperature, 1)
        target_i = alpha * soft_i + (1 - alpha) * one_hot
        target_t = alpha * soft_t + (1 - alpha) * one_hot
    log_i = F.log_softmax(image @ all_texts / temperature, 1)
    log_t = F.log_softmax(text @ all_images / temperature, 1)
    return (-(log_i * target_i).sum(1).mean() - (log_t * target_t).sum(1).mean()) / 2


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_agrees_with_albef(alpha):
    step = draw(16, 200, 32, torch.float64, "cpu", alpha=alpha)
    found = step.run(momentum_contrastive)
    leaves = [t.clone().requires_grad_() for t in step.features[:2]]
    temperature = torch.tensor(step.temperature, dtype=torch.float64, requires_grad=True)
    loss = albef_step(*leaves, *step.features[2:], temperature, alpha)
    loss.backward()
    for ours, theirs in zip(found, (loss.detach(), *(t.grad for t in (*leaves, temperature)))):  # noqa: B905
        torch.testing.assert_close(ours, theirs)


def test_several_positives_share_the_target_equally():
    # As in ALBEF's retrieval fine-tuning: equal ids over batch and queue, rows normalised.
    step = draw(6, 9, 8, torch.float64, "cpu", alpha=0.0, kinds=3)
    image, text, _, text_m, _, text_queue = step.features
    ids, queue_ids = step.ids, step.queue_ids
    same = (ids[:, None] == torch.cat([ids, queue_ids])).double()
    logits = image @ torch.cat([text_m, text_queue]).T / step.temperature
    forth = -(F.log_softmax(logits, 1) * same / same.sum(1, keepdim=True)).sum(1).mean()
    logits = text @ torch.cat([step.features[2], step.features[4]]).T / step.temperature
    back = -(F.log_softmax(logits, 1) * same / same.sum(1, keepdim=True)).sum(1).mean()
    torch.testing.assert_close(step.run(momentum_contrastive)[0], (forth + back) / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ends_of_alpha_are_exact(device, dtype):
    step = draw(20, 300, 32, dtype, device, alpha=0.0)
    zero = torch.zeros((), device=device)
    nan = torch.full_like(step.features[2], torch.nan)
    # The teacher's own rows are keys too; only as queries have they no say.
    for alpha in (0.0, zero):
        ours = check(draw(20, 300, 32, dtype, device, alpha=alpha))
        assert all(t.isfinite().all() for t in ours[:4])
    assert step.with_features(_2=nan).run(momentum_contrastive)[0].isnan()
    # At alpha 1 the one-hot targets and the ids with them are out of it.
    with_ids = draw(20, 300, 32, dtype, device, alpha=1.0, kinds=4)
    without = draw(20, 300, 32, dtype, device, alpha=1.0)
    for ours, theirs in zip(with_ids.run(momentum_contrastive)[:4],
                            without.run(momentum_contrastive)[:4], strict=True):  # fmt: skip
        torch.testing.assert_close(ours, theirs)


def test_alpha_as_a_tensor(device):
    number = draw(20, 100, 16, torch.float32, device, alpha=0.25).run(momentum_contrastive)
    tensor = draw(20, 100, 16, torch.float32, device, alpha=torch.tensor(0.25, device=device))
    for ours, theirs in zip(number, tensor.run(momentum_contrastive), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits(device, dtype):
    # Logits of +-1e5: every softmax is one-hot; a sum without running maxima would overflow.
    check(draw(40, 200, 48, dtype, device, norm=10.0, temperature=0.001))


def test_a_saturated_softmax_keeps_its_small_gradient(device):
    # The own pair's probability is 1 - 1e-7: one bfloat16 rounding of it would be the gradient.
    step = draw(8, 64, 32, torch.bfloat16, device, alpha=0.0, temperature=0.05)
    own = step.features[0]
    step = step.with_features(_3=own, _2=own, _1=own)
    ours = step.run(momentum_contrastive)
    exact = step.run(reference, torch.float64)
    assert (ours[1].double() - exact[1]).norm() <= 0.02 * exact[1].norm()


@pytest.mark.parametrize("isa", ISAS)
def test_well_fitted_rows_keep_their_loss(monkeypatch, isa):
    monkeypatch.setenv("FASTVLP_CPU_ISA", isa)
    check_fitted(lambda step: step.run(momentum_contrastive))


def test_the_reference_keeps_the_loss_of_well_fitted_rows():
    check_fitted(lambda step: step.run(reference))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("temperature", [1e-36, 1e-30, 1e-12, 1e12, 1e30, 1e36])
def test_extreme_temperatures(monkeypatch, isa, temperature):
    monkeypatch.setenv("FASTVLP_CPU_ISA", isa)
    # 33 rows and 3 columns: padded lanes and keys, which must not count.
    step = draw(33, 70, 3, torch.float32, "cpu", temperature=temperature)
    loss = step.run(momentum_contrastive)[0]
    exact = step.run(reference, torch.float64)[0]
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)


def test_nan_reaches_the_loss(device):
    step = draw(20, 100, 16, torch.float32, device)
    for index in range(6):
        broken = step.features[index].clone()
        broken[3, 5] = torch.nan
        assert step.with_features(**{f"_{index}": broken}).run(momentum_contrastive)[0].isnan()


def test_bitwise_deterministic(device):
    for dtype in DTYPES:
        step = draw(70, 900, 64, dtype, device, kinds=50)
        for first, second in zip(step.run(momentum_contrastive), step.run(momentum_contrastive),
                                 strict=True):  # fmt: skip
            assert torch.equal(first, second)


def test_gradient_only_where_asked(device):
    image, text, *rest = draw(20, 100, 16, torch.float32, device).features
    text = text.clone().requires_grad_()
    loss = momentum_contrastive(image, text, *rest, 0.07).loss
    loss.backward()
    assert image.grad is None and text.grad is not None
    result = momentum_contrastive(image, text.detach(), *rest, 0.07, hard_negatives=False)
    assert not result.loss.requires_grad and result[1:] == (None, None)
    torch.testing.assert_close(result.loss, loss.detach())


def test_no_admissible_negative_is_reported(device):
    for step in (
        draw(1, 50, 8, torch.float32, device),
        draw(6, 50, 8, torch.float32, device, kinds=1),
    ):
        *_, texts, images = step.run(momentum_contrastive)
        assert (texts == -1).all() and (images == -1).all()


def test_negatives_never_share_an_id(device):
    step = draw(40, 10, 8, torch.float32, device, kinds=5, temperature=1.0)
    for seed in range(20):
        result = momentum_contrastive(
            *step.features, 1.0, ids=step.ids, queue_ids=step.queue_ids, seed=seed
        )
        for sampled in result[1:]:
            assert (sampled >= 0).all() and (step.ids[sampled] != step.ids).all()


def test_negatives_follow_the_softmax(device):
    # Chi-square at the level of 1e-3, rows and directions together; own pairs and equal ids apart.
    step = draw(9, 5, 16, torch.float32, device, temperature=0.5)
    ids = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 7], device=device)
    draws, counts = 3000, torch.zeros(2, 9, 9, dtype=torch.float64)
    rows = torch.arange(9)
    for seed in range(draws):
        result = momentum_contrastive(
            *step.features, 0.5, ids=ids, queue_ids=torch.arange(10, 15, device=device), seed=seed
        )
        for side, sampled in enumerate(result[1:]):
            counts[side, rows, sampled.cpu()] += 1
    image, text, image_m, text_m = (t.double().cpu() for t in step.features[:4])
    excluded = (ids[:, None] == ids).cpu()
    statistic, freedom = 0.0, 0
    for side, logits in enumerate((image @ text_m.T, text @ image_m.T)):
        expected = draws * (logits / 0.5).masked_fill(excluded, -torch.inf).softmax(1)
        assert not counts[side][excluded].any()
        inside = ~excluded
        statistic += ((counts[side] - expected)[inside] ** 2 / expected[inside]).sum().item()
        freedom += int(inside.sum()) - 9
    # Wilson and Hilferty's normal approximation of the 99.9th percentile (z = 3.0902).
    bound = freedom * (1 - 2 / (9 * freedom) + 3.0902 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic <= bound


def test_the_seed_decides(device):
    step = draw(64, 10, 8, torch.float32, device, temperature=1.0)

    def negatives(seed):
        return torch.stack(momentum_contrastive(*step.features, 1.0, seed=seed)[1:])

    assert torch.equal(negatives(3), negatives(torch.tensor(3, device=device)))
    assert not torch.equal(negatives(3), negatives(4))
    assert not torch.equal(negatives(3), negatives(3 + 2**40))
    torch.manual_seed(7)
    first, second = negatives(None), negatives(None)
    torch.manual_seed(7)
    assert torch.equal(first, negatives(None)) and not torch.equal(first, second)


def test_float64_runs_the_reference_and_passes_gradcheck(device):
    step = draw(4, 6, 5, torch.float64, device, kinds=3)
    temperature = torch.tensor(0.3, dtype=torch.float64, device=device, requires_grad=True)
    leaves = [t.clone().requires_grad_() for t in step.features[:2]]

    def loss(image, text, temperature):
        # Without a teacher, whose targets move with the temperature but pass no gradient.
        return momentum_contrastive(
            image, text, *step.features[2:], temperature, 0.0, ids=step.ids,
            queue_ids=step.queue_ids,
        ).loss  # fmt: skip

    assert torch.autograd.gradcheck(loss, (*leaves, temperature))


def test_second_derivative_is_refused(device):
    image, text, *rest = draw(8, 10, 4, torch.float32, device).features
    image = image.clone().requires_grad_()
    loss = momentum_contrastive(image, text, *rest, 0.1).loss
    (gradient,) = torch.autograd.grad(loss, image, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative.*momentum_contrastive_reference"):
        gradient.sum().backward()


@given(
    batch=st.integers(1, 5000), dim=st.integers(1, 5000), element=st.sampled_from([2, 4])
)  # fmt: skip
def test_the_plan_covers_the_batch(batch, dim, element):
    group_rows, block_keys = plan(batch, dim, element)
    assert 32 <= group_rows <= 64 and group_rows % 32 == 0
    assert 32 <= block_keys <= 512 and block_keys % 32 == 0
