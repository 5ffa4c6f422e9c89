"""AdamWEma against torch.optim.AdamW followed by EmaModel.update()."""

import copy
import math
import sys

import pytest
import torch
from fastvlp_tests.tolerance import assert_as_accurate, epsilon
from torch import nn

import fastvlp.optim
from fastvlp import EmaModel
from fastvlp.optim import AdamWEma


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 33), nn.BatchNorm1d(33), nn.GELU(), nn.Linear(33, 5))


def groups(model):
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    return [{"params": matrices, "lr": 3e-3}, {"params": vectors, "weight_decay": 0.0}]


def backward(model, step):
    """Random gradients: those of a network would differ by rounding, which AdamW normalises."""
    g = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype)


def everything(optimizer, model):
    states = [optimizer.state[p] for p in model.parameters()]
    return [p.detach() for p in model.parameters()] + [
        state[name] for state in states if state for name in ("step", "exp_avg", "exp_avg_sq")
    ]


def compare(ours, theirs, exact):
    for i, (a, b, c) in enumerate(zip(ours, theirs, exact, strict=True)):
        floor = 4 * epsilon(torch.float32) * c.double().norm().item()
        assert_as_accurate(str(i), a.detach(), b.detach(), c.detach().double(), floor)


OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-7, "weight_decay": 0.1}


@pytest.mark.parametrize("maximize", [False, True])
def test_matches_adamw_and_ema_over_many_steps(maximize):
    ours, theirs, exact = network(), network(), network().double()
    ema, other = EmaModel(ours, 0.95, copy_dtype=torch.bfloat16), EmaModel(theirs, 0.95)
    exact_ema = EmaModel(exact, 0.95)
    low = copy.deepcopy(ours).to(torch.bfloat16)
    mine = AdamWEma(groups(ours), **OPTIONS, maximize=maximize, ema=ema, copy=low)
    reference, double = (
        torch.optim.AdamW(groups(model), **OPTIONS, maximize=maximize, foreach=True)
        for model in (theirs, exact)
    )
    where = [p.data_ptr() for p in [*ours.parameters(), *ema.parameters(), *low.parameters()]]
    optimizers = mine, reference, double
    plans = [torch.optim.lr_scheduler.CosineAnnealingLR(each, 50) for each in optimizers]
    for step in range(50):
        for model, optimizer in zip((ours, theirs, exact), optimizers, strict=True):
            optimizer.zero_grad()
            backward(model, step)
            if step % 5 == 4:  # a parameter without gradient is skipped
                model[3].bias.grad = None
            optimizer.step()
        other.update()
        exact_ema.update()
        for plan in plans:
            plan.step()
    compare(everything(mine, ours), everything(reference, theirs), everything(double, exact))
    compare(*(list(each.module.parameters()) for each in (ema, other, exact_ema)))
    assert ours[1].running_mean.equal(ema.module[1].running_mean)
    for full, rounded in ((ema.module, ema.copy), (ours, low)):
        for a, b in zip(full.parameters(), rounded.parameters(), strict=True):
            assert torch.equal(a.bfloat16(), b)
    assert ema.num_updates == 50
    assert where == [
        p.data_ptr() for p in [*ours.parameters(), *ema.parameters(), *low.parameters()]
    ]


@pytest.mark.parametrize("fused", [False, True])
def test_state_of_adamw_loads_and_the_other_way(fused):
    ours, theirs = network(), network()
    reference = torch.optim.AdamW(groups(theirs), **OPTIONS, fused=fused)
    for step in range(3):
        reference.zero_grad()
        backward(theirs, step)
        reference.step()
    ours.load_state_dict(theirs.state_dict())
    mine = AdamWEma(groups(ours))
    mine.load_state_dict(copy.deepcopy(reference.state_dict()))
    back_model = network()
    for step in range(3, 6):
        for model, optimizer in ((ours, mine), (theirs, reference)):
            optimizer.zero_grad()
            backward(model, step)
            optimizer.step()
    for a, b in zip(everything(mine, ours), everything(reference, theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    back = torch.optim.AdamW(groups(back_model))
    back.load_state_dict(mine.state_dict())
    assert back.param_groups[0]["betas"] == (0.9, 0.95)
    assert back.state[back_model[0].weight]["step"] == 6


def test_gradients_of_the_copy():
    model = network()
    low = copy.deepcopy(model).to(torch.bfloat16)
    optimizer = AdamWEma(model.parameters(), lr=1e-2, copy=low, model=model)
    low(torch.randn(8, 9).bfloat16()).square().mean().backward()
    gradient = low[0].weight.grad.float()
    before = model[0].weight.detach().clone()
    optimizer.step()
    expected = before * (1 - 1e-4) - 1e-2 * gradient / (gradient.abs() + 1e-8)
    torch.testing.assert_close(model[0].weight.detach(), expected)
    model(torch.randn(8, 9)).sum().backward()
    with pytest.raises(RuntimeError, match="both have a gradient"):
        optimizer.step()
    optimizer.zero_grad()
    assert all(p.grad is None for p in [*model.parameters(), *low.parameters()])


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_check_finite_leaves_everything(bad):
    model = network()
    ema = EmaModel(model, 0.5)
    optimizer = AdamWEma(groups(model), ema=ema, check_finite=True)
    backward(model, 0)
    model[3].weight.grad[1, 2] = bad
    before = [p.detach().clone() for p in [*model.parameters(), *ema.parameters()]]
    with pytest.raises(FloatingPointError, match=r"gradient of parameter 1 of group 0 .*\(5, 33\)"):
        optimizer.step()
    now = [*model.parameters(), *ema.parameters()]
    assert all(map(torch.equal, now, before)) and not optimizer.state and ema.num_updates == 0
    model[3].weight.grad[1, 2] = 0.0
    optimizer.step()
    assert ema.num_updates == 1


def test_a_step_that_fails_half_way_says_what_was_written(monkeypatch):
    model = network()
    ema = EmaModel(model, 0.5)
    optimizer = AdamWEma(groups(model), ema=ema)
    backward(model, 0)
    real, calls = fastvlp.optim.adamw_ema, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("no room")
        real(*args, **kwargs)

    vectors = [p.detach().clone() for p in model.parameters() if p.dim() == 1]
    monkeypatch.setattr(fastvlp.optim, "adamw_ema", failing)
    with pytest.raises(RuntimeError, match="taken for 2 of 6 parameters .*no room"):
        optimizer.step()
    assert ema.num_updates == 0
    steps = {p: state["step"].item() for p, state in optimizer.state.items()}
    assert steps == {model[0].weight: 1.0, model[3].weight: 1.0}
    assert all(map(torch.equal, vectors, [p for p in model.parameters() if p.dim() == 1]))
    calls[:] = [1]
    untouched = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(MemoryError, match="no room"):
        optimizer.step()
    assert all(map(torch.equal, untouched, model.parameters()))


def test_a_momentum_that_fails_after_the_step_says_what_was_written(monkeypatch):
    model = network()
    ema = EmaModel(model, 0.5)
    optimizer = AdamWEma(groups(model), ema=ema)
    backward(model, 0)
    before = [p.detach().clone() for p in [*model.parameters(), *ema.parameters()]]

    def failing(*_, **__):
        raise MemoryError("no room")

    monkeypatch.setattr(sys.modules["fastvlp.nn.ema_model"], "ema", failing)
    message = "taken for all 6 parameters .*rest of the momentum model .*num_updates: no room"
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert ema.num_updates == 0
    assert {state["step"].item() for state in optimizer.state.values()} == {1.0}
    now = [*model.parameters(), *ema.parameters()]
    assert not any(map(torch.equal, now, before))
    for p in model.parameters():
        p.grad = None
    with pytest.raises(MemoryError, match="no room"):
        optimizer.step()


def test_a_mismatched_rest_of_the_momentum_is_refused_before_the_step():
    model = network()
    ema = EmaModel(model, 0.5)
    optimizer = AdamWEma(groups(model), ema=ema)
    backward(model, 0)
    model[1].running_mean = torch.zeros(3)
    before = [p.detach().clone() for p in [*model.parameters(), *ema.parameters()]]
    with pytest.raises(ValueError, match=r"1\.running_mean: .*nothing was written"):
        optimizer.step()
    now = [*model.parameters(), *ema.parameters()]
    assert all(map(torch.equal, now, before)) and not optimizer.state and ema.num_updates == 0


def test_closure_and_frozen_parameters():
    model = network()
    ema = EmaModel(model, 0.5)
    model[0].requires_grad_(False)
    optimizer = AdamWEma([p for p in model.parameters() if p.requires_grad], ema=ema)
    with torch.no_grad():
        model[0].weight.add_(1.0)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(4, 9)).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad
    torch.testing.assert_close(ema.module[0].weight, model[0].weight - 0.5)


def test_what_is_refused():
    p = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="amsgrad: AdamWEma does not support it"):
        AdamWEma([p], amsgrad=True)
    for name in ("capturable", "differentiable"):
        AdamWEma([p], **{name: False})
        with pytest.raises(ValueError, match=f"{name}: AdamWEma does not support it"):
            AdamWEma([p], **{name: True})
    with pytest.raises(ValueError, match="lr: expected a finite number of at least 0"):
        AdamWEma([p], lr=-1.0)
    with pytest.raises(ValueError, match=r"betas\[1\]: expected a value in"):
        AdamWEma([p], betas=(0.9, 1.0))
    optimizer = AdamWEma([p], lr=torch.tensor(0.1))
    amsgrad = torch.optim.AdamW([p], amsgrad=True)
    with pytest.raises(ValueError, match="amsgrad: AdamWEma does not support it"):
        optimizer.load_state_dict(amsgrad.state_dict())
    p.grad = torch.zeros(3).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    with pytest.raises(ValueError, match="copy: expected `model` as well"):
        AdamWEma([p], copy=nn.Linear(1, 1))
    with pytest.raises(ValueError, match="copy: expected the model's parameters"):
        AdamWEma([p], copy=nn.Linear(1, 1), model=nn.Linear(1, 1, bias=False))
