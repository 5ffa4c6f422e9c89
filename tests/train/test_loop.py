"""The loop's step: chunks, clipping, precision, and steps that are left out."""

import copy

import pytest
import torch
from fastvlp_tests.tiny_run import PlainTask, Regression, build, settings

from fastvlp.nn.ema_model import EmaModel
from fastvlp.optim import AdamWEma
from fastvlp.train import parallel
from fastvlp.train.loop import Loop, LossScale


@pytest.fixture
def make(tmp_path):
    """Builds a loop with a task, an average and the first batches of the tiny run."""

    def make(kind=PlainTask, dtype=torch.float32, chunk_size=None, **options):
        config = settings(tmp_path, chunk_size=chunk_size)
        with parallel.ranks("cpu") as ranks:
            task, loader = build(config, ranks, kind, dtype)
        average = EmaModel(task.model, 0.9)
        optimizer = AdamWEma(task.model.parameters(), lr=1e-2, eps=1e-3, ema=average)
        loop = Loop(task, task.model, loader, optimizer, lambda s: 1e-2, steps=3, **options)
        loop.average = average
        loop.model.train()
        return loop

    return make


def one_batch(loop, dtype=torch.float32):
    batch = next(iter(loop.loader))
    batch.images = batch.images.to(dtype)
    return batch


def gradients(loop, dtype=torch.float32):
    losses = loop.task.backward(loop.model, one_batch(loop, dtype))
    return losses, {n: p.grad for n, p in loop.model.named_parameters()}


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_chunks_have_the_gradients_of_the_whole_batch(make, chunk):
    wide = torch.float64
    wanted_loss, wanted = gradients(make(dtype=wide), wide)
    loss, ours = gradients(make(dtype=wide, chunk_size=chunk), wide)
    torch.testing.assert_close(loss, wanted_loss)
    for name, gradient in wanted.items():
        torch.testing.assert_close(ours[name], gradient, msg=name)


@pytest.mark.parametrize("chunk", [1, 4, 7, 10])
def test_accumulation_of_means_is_the_mean(chunk):
    batch = torch.randn(10, 3, dtype=torch.float64)
    whole, parts = Regression(), Regression(chunk)
    wanted, found = (task.backward(task.model, batch, 4.0) for task in (whole, parts))
    assert found.keys() == wanted.keys() == {"loss", "size"}
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name])
    for p, q in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def everything(loop):
    return copy.deepcopy(
        [loop.model.state_dict(), loop.average.state_dict(), loop.optimizer.state_dict()]
    )


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_leaves_everything_as_it_was(make, value):
    loop = make()
    assert loop.train_step(one_batch(loop)).taken
    before = everything(loop)
    batch = one_batch(loop)
    batch.images[0, 0, 0, 0] = value
    report = loop.train_step(batch)
    assert not report.taken and not report.norm < float("inf")
    assert equal(everything(loop), before)
    assert loop.skipped == 1
    assert all(p.grad is None for p in loop.model.parameters())
    assert loop.train_step(one_batch(loop)).taken
    assert not equal(everything(loop), before) and loop.skipped_in_a_row == 0


def test_many_such_steps_in_a_row_end_the_run(make):
    loop = make(max_skipped=3)
    loop.model.text_projection.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="gradients of the last 3 steps"):
        loop.run()


def test_gradients_are_clipped_to_the_norm_over_all_of_them(make):
    free, clipped = make(), make(clip_norm=1e-3)
    seen = {}
    for name, loop in (("free", free), ("clipped", clipped)):
        step = loop.optimizer.step
        loop.optimizer.step = lambda name=name, loop=loop, step=step: (
            seen.update({name: [p.grad.clone() for p in loop.model.parameters()]}), step(),
        )  # fmt: skip
        report = loop.train_step(one_batch(loop))
    wanted = [g.clone() for g in seen["free"]]
    for p, g in zip(clipped.model.parameters(), wanted, strict=True):
        p.grad = g
    norm = torch.nn.utils.clip_grad_norm_(clipped.model.parameters(), 1e-3)
    assert report.norm == pytest.approx(norm.item())
    for ours, p in zip(seen["clipped"], clipped.model.parameters(), strict=True):
        torch.testing.assert_close(ours, p.grad)


@pytest.mark.parametrize("norm", [-1.0, 0.0, float("nan"), float("inf")])
def test_a_norm_to_clip_to_is_a_positive_number(make, norm):
    with pytest.raises(ValueError, match="clip_norm: expected a number more than 0"):
        make(clip_norm=norm)


def test_the_loss_scale_halves_on_overflow_and_doubles_after_a_while():
    scale = LossScale(True, start=8.0, patience=2)
    values = []
    for finite in (True, False, True, True, True, True, False, False, False, False, False, False):
        scale.update(finite)
        values.append(scale.value)
    assert values == [8, 4, 4, 8, 8, 16, 8, 4, 2, 1, 1, 1]
    unused = LossScale(False)
    unused.update(False)
    assert unused.value == 1.0


def test_a_scaled_loss_steps_as_an_unscaled_one(make):
    plain, scaled = make(), make()
    scaled.scale = LossScale(True)
    reports = [loop.train_step(one_batch(loop)) for loop in (plain, scaled)]
    # A power of two changes no digit.
    assert reports[0].norm == pytest.approx(reports[1].norm, rel=1e-6)
    assert equal(plain.model.state_dict(), scaled.model.state_dict())


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_low_precision_learns(make, precision):
    loop = make(precision=precision)
    losses = []
    loop.steps, loop.hooks = 12, [lambda loop, report: losses.append(report.losses["loss"])]
    loop.run()
    assert torch.stack(losses[-3:]).mean() < torch.stack(losses[:3]).mean()
    assert all(p.dtype == torch.float32 for p in loop.model.parameters())


@pytest.mark.thorough
def test_recomputed_and_compiled_blocks_give_the_same_gradients(make):
    _, wanted = gradients(make())
    recomputed = make()
    parallel.recompute(recomputed.task.blocks())
    compiled = make()
    for block in compiled.task.blocks():
        block.compile(backend="aot_eager")
    for loop in (recomputed, compiled):
        _, ours = gradients(loop)
        for name, gradient in wanted.items():
            torch.testing.assert_close(ours[name], gradient, msg=name)


def test_recomputed_blocks_keep_less(make):
    def kept(loop):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (sizes.append(t.numel()), t)[1], lambda t: t
        ):
            loop.task.losses(loop.model, one_batch(loop))
        return sum(sizes)

    plain, less = make(), make()
    parallel.recompute(less.task.blocks())
    assert kept(less) < kept(plain) / 2


def test_an_epoch_without_a_whole_batch_is_said(make):
    loop = make()
    loop.loader.batch_size = 1000
    with pytest.raises(ValueError, match="no whole batch"):
        loop.run()


def test_norms_and_means_are_not_decayed(make):
    task = make().task
    kept = {n for n, p in task.model.named_parameters() if not task.uses_weight_decay(n, p)}
    assert {"logit_scale", "positional_embedding", "visual.class_embedding"} <= kept
    assert "visual.conv1.weight" not in kept and "text_projection" not in kept
    assert all(n.endswith(("bias", "embedding", "scale")) or "ln" in n for n in kept)
