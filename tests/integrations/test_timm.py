"""timm's ModelEmaV3 and ours in its place: the same averages, the same files."""

import copy

import pytest
import torch
from timm.utils import ModelEmaV3 as TimmEma

from fastvlp.integrations.timm import ModelEmaV3
from fastvlp.optim import AdamWEma


def small():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.BatchNorm1d(6))


def train(model, *averages, steps=6, told=True):
    """Random steps of the model, each followed by an update of the averages."""
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        with torch.no_grad():
            for p in model.parameters():
                p += 0.1 * torch.randn(p.shape, generator=generator)
        model(torch.randn(5, 8, generator=generator))  # moves BatchNorm's statistics
        for average in averages:
            average.update(model, step=step if told else None)


def assert_equal_states(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"exclude_buffers": True},
        {"use_warmup": True, "update_after_step": 2},
        {"use_warmup": True, "warmup_power": 0.75, "min_decay": 0.5},
        {"update_after_step": 3, "foreach": False},
        {"dtype": torch.float64},
    ],
    ids=str,
)
def test_averages_are_those_of_timm(options, told):
    model = small()
    ours, theirs = (kind(model, decay=0.9, **options) for kind in (ModelEmaV3, TimmEma))
    train(model, ours, theirs, told=told)
    assert_equal_states(ours, theirs)
    for step in (None, 0, 1, 2, 3, 10, 10**6):
        assert ours.get_decay(step) == theirs.get_decay(step)


@pytest.mark.parametrize("saved, loaded", [(ModelEmaV3, TimmEma), (TimmEma, ModelEmaV3)])
def test_a_state_of_either_loads_into_the_other(saved, loaded):
    model = small()
    source, other = saved(model, decay=0.9), loaded(model, decay=0.9)
    train(model, source)
    other.load_state_dict(source.state_dict())
    train(model, source, other)
    assert_equal_states(*((source, other) if saved is ModelEmaV3 else (other, source)))


def test_set_takes_the_values_of_a_model():
    model, ema = small(), ModelEmaV3(small(), decay=0.9)
    train(model)
    ema.set(model)
    assert all(map(torch.equal, ema.module.state_dict().values(), model.state_dict().values()))
    before = ema.module[0].weight.clone()
    with torch.no_grad():
        model[0].weight += 1
    ema.update()  # follows it from then on
    torch.testing.assert_close(ema.module[0].weight, before + 0.1)


def test_half_precision_is_averaged_in_float32():
    model = small().bfloat16()
    ema = ModelEmaV3(model, decay=0.999)
    before = ema.module[0].weight.clone()
    with torch.no_grad():
        model[0].weight += 0.5
    ema.update(model)
    assert ema.module[0].weight.dtype == torch.float32
    moved = (ema.module[0].weight - before).mean()
    assert moved == pytest.approx(0.0005, rel=0.05)  # below a step of bfloat16


def test_an_average_on_another_device_is_fed_by_copies(monkeypatch):
    """There is no second device here: the model is said to be on one."""
    monkeypatch.setattr("fastvlp.integrations.timm._device", lambda _: torch.device("meta"))
    model = small()
    ours, theirs = ModelEmaV3(model, decay=0.9, device="cpu"), TimmEma(model, decay=0.9)
    assert ours.model is not model
    train(model, ours, theirs)
    assert_equal_states(ours, theirs)
    with pytest.raises(TypeError, match="model: expected the model, whose average is on another"):
        ours.update()


def test_another_structure_is_refused_and_nothing_is_written():
    model, ema = small(), ModelEmaV3(small())
    before = copy.deepcopy(ema.state_dict())
    with pytest.raises(ValueError, match="they differ in"):
        ema.update(torch.nn.Sequential(torch.nn.Linear(8, 6)))
    assert all(map(torch.equal, before.values(), ema.state_dict().values()))
    ema.update(model)


def test_it_is_the_momentum_of_an_optimiser_too():
    model = torch.nn.Linear(8, 6)
    reference = copy.deepcopy(model)
    ema, theirs = ModelEmaV3(model, decay=0.9), TimmEma(reference, decay=0.9)
    ours = AdamWEma(model.parameters(), ema=ema, lr=1e-2)
    adam = torch.optim.AdamW(reference.parameters(), lr=1e-2)
    for _ in range(3):
        x = torch.randn(5, 8)
        for each, optimizer in ((model, ours), (reference, adam)):
            each(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        theirs.update(reference)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ema.state_dict()[name], value, rtol=1e-5, atol=1e-6, msg=name)
