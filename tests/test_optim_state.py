"""AdamWEma's options, each checked at once, and its state beside an EmaModel."""

import copy
import math

import pytest
import torch
from torch import nn

from fastvlp import EmaModel
from fastvlp.ops import adamw_ema
from fastvlp.optim import AdamWEma

BAD = [
    ({"betas": (0.9,)}, ValueError, r"betas: expected two numbers, got \(0.9,\)"),
    ({"betas": (0.9, 0.95, 0.99)}, ValueError, "betas: expected two numbers"),
    ({"betas": 0.9}, TypeError, "betas: expected two numbers, got 0.9"),
    ({"betas": ("a", 0.9)}, TypeError, r"betas\[0\]: expected a number, got 'a'"),
    ({"betas": (0.9, math.nan)}, ValueError, r"betas\[1\]: expected a value in \[0, 1\)"),
    ({"lr": "1e-3"}, TypeError, "lr: expected a number, got '1e-3'"),
    ({"lr": math.nan}, ValueError, "lr: expected a finite number of at least 0, got nan"),
    ({"lr": torch.ones(2)}, TypeError, "lr: expected a number"),
    ({"eps": None}, TypeError, "eps: expected a number, got None"),
    ({"weight_decay": math.inf}, ValueError, "weight_decay: expected a finite number"),
]


@pytest.mark.parametrize("options, error, message", BAD)
def test_options_are_checked_when_they_are_given(options, error, message):
    p, q = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))
    with pytest.raises(error, match=f"^{message}"):
        AdamWEma([p], **options)
    with pytest.raises(error, match=rf"^{message}.*\(group 1\)"):
        AdamWEma([{"params": [p]}, {"params": [q], **options}])
    optimizer = AdamWEma([p])
    with pytest.raises(error, match=f"^{message}"):
        optimizer.add_param_group({"params": [q], **options})
    assert len(optimizer.param_groups) == 1
    state = optimizer.state_dict()
    state["param_groups"][0] |= options
    with pytest.raises(error, match=rf"^{message}.*\(group 0 of the state\)"):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    x = torch.ones(3)
    with pytest.raises(error, match=f"^{message}"):
        adamw_ema([x], [x], [x.clone()], [x.clone()], **{"step": 1, "lr": 0.1} | options)
    assert (x == 1).all()


def test_a_step_that_is_no_number():
    x = torch.ones(3)
    for step, error in (("1", TypeError), (0, ValueError), (math.nan, ValueError)):
        with pytest.raises(error, match="^step: expected"):
            adamw_ema([x], [x], [x.clone()], [x.clone()], step=step, lr=0.1)


def test_foreach_and_fused_are_accepted_without_effect():
    results = []
    for options in ({}, {"foreach": True}, {"fused": True}, {"fused": False, "foreach": None}):
        p = nn.Parameter(torch.arange(3.0))
        optimizer = AdamWEma([p], **options)
        p.grad = torch.ones(3)
        optimizer.step()
        results.append(p.detach())
    assert all(torch.equal(results[0], each) for each in results)
    with pytest.raises(TypeError, match="fused: expected True, False or None, got 'yes'"):
        AdamWEma([p], fused="yes")


def made(seed=0, with_ema=True):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    ema = EmaModel(model, 0.9) if with_ema else None
    return model, ema, AdamWEma(model.parameters(), lr=0.1, ema=ema)


def steps(model, optimizer, seeds):
    for seed in seeds:
        g = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=g)
        optimizer.step()


def test_a_resumed_run_needs_the_momentum_too():
    model, ema, optimizer = made()
    steps(model, optimizer, range(3))
    saved = copy.deepcopy((model.state_dict(), ema.state_dict(), optimizer.state_dict()))
    steps(model, optimizer, range(3, 5))

    alone = made(1, with_ema=False)[2]
    with pytest.raises(ValueError, match="EmaModel of 3 updates.*make this one with ema="):
        alone.load_state_dict(saved[2])
    assert not alone.state

    other, momentum, resumed = made(2)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[2])
    before = [p.detach().clone() for p in [*other.parameters(), *momentum.parameters()]]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="of 3 updates, this one has 0; load the EmaModel"):
            steps(other, resumed, [3])
        now = [*other.parameters(), *momentum.parameters()]
        assert all(map(torch.equal, before, now)) and momentum.num_updates == 0
    momentum.load_state_dict(saved[1])
    steps(other, resumed, range(3, 5))
    for ours, theirs in ((other, model), (momentum.module, ema.module)):
        assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))
    steps(other, resumed, [9])


def test_states_without_a_momentum_load_as_before():
    model, ema, optimizer = made()
    steps(model, optimizer, range(2))
    plain = torch.optim.AdamW(model.parameters())
    plain.load_state_dict(optimizer.state_dict())
    assert plain.state[model[0].weight]["step"] == 2
    _, _, other = made(1)
    other.load_state_dict(torch.optim.AdamW(made(3)[0].parameters()).state_dict())
    assert all("ema_updates" not in group for group in other.param_groups)
    assert "ema_updates" not in made(with_ema=False)[2].state_dict()["param_groups"][0]
