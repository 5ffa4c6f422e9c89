"""EmaModel and a model that changes, complex values, and the mode in which it computes."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from fastvlp import EmaModel
from fastvlp.models import albef
from fastvlp.optim import AdamWEma


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.Dropout(0.5))


class LowRank(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.down = base, nn.Linear(base.in_features, 1)

    def forward(self, x):
        return self.base(x) + self.down(x)


def put(index, make):
    return lambda model: model.__setitem__(index, make(model[index]))


CHANGES = {
    "an adapter around a layer": put(0, LowRank),
    "an appended block": lambda model: model.append(nn.Linear(2, 2)),
    "a deleted child": lambda model: model.__delitem__(2),
    "another activation": put(1, lambda _: nn.GELU()),
    "another kind of head": put(2, lambda _: nn.Bilinear(4, 4, 2)),
}


def values(module):
    return [t.clone() for t in module.state_dict().values()]


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_model_with_other_submodules_is_refused(change):
    model = network()
    ema = EmaModel(model, 0.5)
    optimizer = AdamWEma(model.parameters(), ema=ema)
    change(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = values(ema.module), values(model)
    for call in (ema.update, ema.update, optimizer.step):
        with pytest.raises(ValueError, match="^model: its submodules changed .* new EmaModel"):
            call()
        assert ema.num_updates == 0
        for old, module in zip(before, (ema.module, model), strict=True):
            assert all(map(torch.equal, old, values(module)))


def test_a_head_of_another_size_is_refused_and_of_the_same_is_followed():
    model = network()
    ema = EmaModel(model, 0.5)
    model[2] = nn.Linear(4, 5)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^2.weight: .*\(5, 4\).*new EmaModel"):
            ema.update()
    model[2] = nn.Linear(4, 2)
    expected = (ema.module[2].weight + model[2].weight) / 2
    ema.update()
    torch.testing.assert_close(ema.module[2].weight, expected)


def test_the_same_change_of_both_is_followed():
    model = network()
    ema = EmaModel(model, 0.5)
    for each in (model, ema.module):
        each.append(nn.Linear(2, 2))
    expected = (ema.module[4].weight + model[4].weight) / 2
    ema.update()
    torch.testing.assert_close(ema.module[4].weight, expected)


def test_the_copy_has_to_change_as_well():
    model = network()
    ema = EmaModel(model, 0.5, copy_dtype=torch.bfloat16)
    for each in (model, ema.module):
        each[1] = nn.GELU()
    before = values(ema.copy)
    with pytest.raises(ValueError, match="1 is GELU in the model and ReLU in its copy. Make"):
        ema.update()
    assert all(map(torch.equal, before, values(ema.copy)))
    ema.copy[1] = nn.GELU()
    ema.update()
    assert ema.num_updates == 1


@pytest.mark.parametrize("wrap", [
    checkpoint_wrapper, lambda layer: torch.compile(layer, backend="eager"),
], ids=["activation checkpointing", "torch.compile"])  # fmt: skip
def test_wrapped_submodules_are_the_same(wrap):
    model = network()
    ema = EmaModel(model, 0.5)
    model[0] = wrap(model[0])
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(3.0)
    expected = [(a + 3) / 2 for a in ema.module.parameters()]
    ema.update()
    for found, wanted in zip(ema.module.parameters(), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_tables_made_at_the_first_call_may_be_in_the_model_alone():
    model = network()
    ema = EmaModel(model, 0.5)
    model[0].register_buffer("table", torch.ones(7), persistent=False)
    expected = (ema.module[0].weight + model[0].weight) / 2
    ema.update()
    torch.testing.assert_close(ema.module[0].weight, expected)
    ema.module[0].register_buffer("table", torch.zeros(7), persistent=False)
    ema.update()
    assert (ema.module[0].table == 1).all()
    model[0].register_buffer("counts", torch.ones(2))
    with pytest.raises(ValueError, match="the model's buffers; they differ in .*counts"):
        ema.update()


@pytest.mark.parametrize("buffers", ["copy", "average"])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_values_are_averaged(buffers, dtype):
    def values():
        return torch.randn(3, 2, dtype=dtype)

    torch.manual_seed(0)
    model = nn.ParameterDict(
        {"weight": nn.Parameter(values()), "real": nn.Parameter(torch.ones(2))}
    )
    model.register_buffer("phase", values())
    ema = EmaModel(model, 0.9, buffers=buffers)
    weight, phase = model["weight"].detach().clone(), model.phase.clone()
    for _ in range(3):
        with torch.no_grad():
            model["weight"].add_(values())
            model.phase.copy_(values())
        ema.update(check_finite=True)
        weight = 0.9 * weight + 0.1 * model["weight"].detach()
        phase = 0.9 * phase + 0.1 * model.phase if buffers == "average" else model.phase
    torch.testing.assert_close(ema.module["weight"].detach(), weight)
    torch.testing.assert_close(ema.module.phase, phase)
    with ema.swap():
        torch.testing.assert_close(model["weight"].detach(), weight)
    with torch.no_grad():
        model["weight"][0, 0] = complex(0, float("nan"))
    with pytest.raises(FloatingPointError, match="^weight: "):
        ema.update(check_finite=True)


def test_complex_values_have_no_copy_of_real_dtype():
    model = nn.ParameterDict({"weight": nn.Parameter(torch.ones(2, dtype=torch.complex64))})
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="leave out copy_dtype"):
        EmaModel(model, copy_dtype=torch.bfloat16)


@pytest.mark.parametrize("copy_dtype", [None, torch.bfloat16])
def test_it_evaluates_whatever_the_model_does(copy_dtype):
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)).train()
    ema = EmaModel(model, 0.9, copy_dtype=copy_dtype)
    holder = nn.ModuleDict({"ema": ema, "model": model}).train()
    assert not any(module.training for module in ema.modules()) and model.training
    x = torch.randn(4, 8).to(copy_dtype or torch.float32)
    before = values(ema.module)
    assert torch.equal(ema(x), ema(x))
    assert all(map(torch.equal, before, values(ema.module)))
    ema.module.train()
    assert ema.module[2].training and model[2].training
    holder.eval()
    assert not ema.module[2].training and not model.training
    given = EmaModel(model, module=copy.deepcopy(model).train())
    assert not given.module.training


@pytest.mark.parametrize("dropout", [True, False])
@pytest.mark.parametrize("copy_dtype", [None, "bfloat16"])
def test_albefs_teacher_has_dropout_while_the_model_trains(dropout, copy_dtype):
    model = albef.create("tiny", teacher_dropout=dropout, momentum_copy=copy_dtype)
    for change, training in ((lambda: None, True), (model.eval, False), (model.train, True)):
        change()
        modes = {module.training for module in model.teacher.modules()}
        assert modes == {training and dropout}
