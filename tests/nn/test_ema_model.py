"""EmaModel: momentum copies of modules against the recurrence, and everything they must survive."""

import copy
import math
import sys

import pytest
import torch
from torch import nn

from fastvlp import EmaModel, EmaWarmup


class Tower(nn.Module):
    """Tied and frozen parameters, BatchNorm's buffers, a mask of -inf, an empty tensor."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(6)
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.nothing = nn.Parameter(torch.empty(0))
        self.register_buffer("mask", torch.full((2, 2), -math.inf).triu(1), persistent=False)

    def forward(self, x):
        return self.second(self.norm(self.first(x)))


def change(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for t in [*model.parameters(), *model.buffers()]:
            if t.is_floating_point() and t.isfinite().all():
                t.add_(torch.randn(t.shape, generator=g).to(t))
            elif not t.is_floating_point():
                t.add_(1)


def values(module):
    return {k: v.clone() for k, v in [*module.named_parameters(), *module.named_buffers()]}


def addresses(module):
    return {k: v.data_ptr() for k, v in [*module.named_parameters(), *module.named_buffers()]}


@pytest.fixture
def model(device):
    torch.manual_seed(0)
    return Tower().to(device)


@pytest.mark.parametrize("buffers", ["copy", "average"])
@pytest.mark.parametrize("copy_dtype", [None, torch.bfloat16])
def test_follows_the_recurrence(model, buffers, copy_dtype):
    ema = EmaModel(model, 0.9, buffers=buffers, copy_dtype=copy_dtype)
    exact = {k: v.double() for k, v in values(model).items()}
    parameters = dict(model.named_parameters())
    before = addresses(ema)
    for step in range(5):
        change(model, step)
        ema.update()
        for name, now in values(model).items():
            averaged = name in parameters or (buffers == "average" and now.is_floating_point())
            if averaged and now.isfinite().all():
                exact[name] = 0.9 * exact[name] + 0.1 * now.double()
            else:
                exact[name] = now.double()
    assert addresses(ema) == before and ema.num_updates == 5
    ours = values(ema.module)
    assert ours.keys() == exact.keys() and "second.weight" not in dict(model.named_parameters())
    for name, value in ours.items():
        torch.testing.assert_close(value.double(), exact[name], rtol=1e-6, atol=1e-6)
        if name not in parameters and buffers == "copy":
            assert torch.equal(value.double(), exact[name])
    assert ema.module.second.weight is ema.module.first.weight
    if copy_dtype is not None:
        for name, value in values(ema.copy).items():
            assert torch.equal(value, ours[name].to(value.dtype))
            assert value.dtype == (copy_dtype if ours[name].is_floating_point() else torch.int64)


def test_forward_and_gradients(model, device):
    ema = EmaModel(model, copy_dtype=torch.bfloat16)
    assert not any(p.requires_grad for p in ema.parameters())
    assert all(p.requires_grad for n, p in model.named_parameters() if n != "frozen")
    x = torch.randn(8, 6, device=device)
    assert ema(x.bfloat16()).dtype == torch.bfloat16
    assert EmaModel(model)(x).dtype == torch.float32
    assert ema.model is model and model not in set(ema.modules())


def test_a_low_precision_model_gets_a_float32_momentum(model):
    model.bfloat16()
    ema = EmaModel(model, 0.999, copy_dtype=torch.bfloat16)
    assert {p.dtype for p in ema.module.parameters()} == {torch.float32}
    assert {p.dtype for p in EmaModel(model, dtype=None).module.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        model.first.bias.fill_(1.0)
        ema.module.first.bias.fill_(0.5)
    for _ in range(10):
        ema.update()
    expected = 1 - 0.5 * 0.999**10
    torch.testing.assert_close(ema.module.first.bias, torch.full_like(
        ema.module.first.bias, expected))  # fmt: skip


def test_decay_as_schedule_and_tensor(model, device):
    seen = []

    def schedule(update):
        seen.append(update)
        return 0.5

    for decay in (schedule, torch.tensor(0.5, device=device), 0.5):
        ema = EmaModel(model, decay)
        start = values(ema.module)
        change(model)
        ema.update()
        ema.update()
        for name, p in model.named_parameters():
            torch.testing.assert_close(
                ema.module.get_parameter(name), 0.25 * start[name] + 0.75 * p.detach()
            )
    assert seen == [0, 1]


def test_warmup_is_timms():
    from timm.utils import ModelEmaV3

    for gamma, power, start, least in ((1.0, 2 / 3, 0, 0.0), (10.0, 0.75, 5, 0.3)):
        theirs = ModelEmaV3(
            nn.Linear(1, 1), 0.99, min_decay=least, update_after_step=start, use_warmup=True,
            warmup_gamma=gamma, warmup_power=power,
        )  # fmt: skip
        ours = EmaWarmup(0.99, gamma, power, start, least)
        for update in (0, 1, 2, 5, 6, 7, 50, 10_000):
            assert ours(update) == pytest.approx(theirs.get_decay(update))


def test_resumes_exactly(model, tmp_path):
    schedule = EmaWarmup(0.99)
    ema = EmaModel(model, schedule, copy_dtype=torch.bfloat16)
    for step in range(3):
        change(model, step)
        ema.update()
    torch.save(ema.state_dict(), tmp_path / "ema.pt")
    assert not any(key.startswith("copy") for key in ema.state_dict())
    resumed = EmaModel(copy.deepcopy(model), schedule, copy_dtype=torch.bfloat16)
    before = addresses(resumed)
    resumed.load_state_dict(torch.load(tmp_path / "ema.pt", weights_only=True))
    assert addresses(resumed) == before and resumed.num_updates == 3
    for step in range(3, 6):
        change(model, step)
        change(resumed.model, step)
        ema.update()
        resumed.update()
    for name, value in values(ema).items():
        assert torch.equal(value, values(resumed)[name]), name
    wrong = ema.state_dict()
    del wrong["module.frozen"]
    with pytest.raises(RuntimeError, match="module.frozen"):
        resumed.load_state_dict(wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swap(model, dtype):
    model.to(dtype)
    ema = EmaModel(model, 0.5)
    change(model)
    ema.update()
    ours, theirs = values(ema.module), values(model)
    where = addresses(model), addresses(ema.module)
    with pytest.raises(ZeroDivisionError), ema.swap() as swapped:
        assert swapped is model
        for name, value in values(model).items():
            assert torch.equal(value, ours[name].to(value.dtype))
        for refused in (ema.update, ema.state_dict, lambda: ema.load_state_dict({})):
            with pytest.raises(RuntimeError, match="swapped"):
                refused()
        with pytest.raises(RuntimeError, match="swapped"), ema.swap():
            raise AssertionError("not reached")
        assert (addresses(model), addresses(ema.module)) == where
        raise ZeroDivisionError
    assert (addresses(model), addresses(ema.module)) == where
    for before, module in ((ours, ema.module), (theirs, model)):
        assert all(torch.equal(value, before[name]) for name, value in values(module).items())
    ema.update()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_check_finite_names_the_parameter(model, bad):
    ema = EmaModel(model, 0.5, copy_dtype=torch.bfloat16)
    change(model)
    with torch.no_grad():
        model.second.bias[2] = bad
    before = values(ema)
    with pytest.raises(FloatingPointError, match=r"second\.bias: .*nothing was written"):
        ema.update(check_finite=True)
    assert all(torch.equal(v, before[n]) for n, v in values(ema).items()) and ema.num_updates == 0
    with torch.no_grad():
        model.second.bias[2] = 0.0
    ema.update(check_finite=True)
    assert ema.num_updates == 1 and not torch.equal(
        values(ema)["module.frozen"], before["module.frozen"]
    )


def test_replaced_tensors_are_found(model, device):
    ema = EmaModel(model, 0.5)
    model.frozen = nn.Parameter(torch.full((3,), 8.0, device=device))
    ema.module.frozen = nn.Parameter(torch.full((3,), 4.0, device=device))
    ema.update()
    assert (ema.module.frozen == 6).all()
    model.double()
    ema.double()
    ema.update()
    assert (ema.module.frozen == 7).all() and ema.module.frozen.dtype == torch.float64


def test_wrapped_models_and_lists_of_towers(model):
    towers = nn.ModuleList([model, nn.Linear(3, 3)])
    ema = EmaModel(nn.DataParallel(torch.compile(towers)), 0.5)
    assert ema.model is towers
    before = towers[1].weight.detach().clone()
    change(towers)
    ema.update()
    torch.testing.assert_close(ema.module[1].weight, (before + towers[1].weight) / 2)


def test_what_is_refused(model):
    with pytest.raises(ValueError, match="buffers: expected 'copy' or 'average', got 'keep'"):
        EmaModel(model, buffers="keep")
    with pytest.raises(ValueError, match="module: expected the model's parameters; .*first.bias"):
        EmaModel(model, module=nn.Linear(6, 6))
    ema = EmaModel(model, 1.5)
    with pytest.raises(ValueError, match="decay: expected a value between 0 and 1"):
        ema.update()
    assert ema.num_updates == 0


@pytest.mark.parametrize("buffers", ["copy", "average"])
@pytest.mark.parametrize("name", ["running_mean", "num_batches_tracked"])
def test_a_mismatched_buffer_is_refused_before_anything_moves(model, buffers, name):
    ema = EmaModel(model, lambda update: 0.5, buffers=buffers, copy_dtype=torch.bfloat16)
    change(model)
    right = getattr(model.norm, name)
    setattr(model.norm, name, torch.ones(2, 1, dtype=right.dtype, device=right.device))
    before = values(ema)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"norm\.{name}: .*\(2, 1\).*nothing was written"):
            ema.update()
        assert ema.num_updates == 0
        assert all(torch.equal(v, before[n]) for n, v in values(ema).items())
    setattr(model.norm, name, right)
    ema.update()
    assert ema.num_updates == 1
    assert torch.equal(ema.module.norm.num_batches_tracked, torch.ones_like(
        model.norm.num_batches_tracked))  # fmt: skip


def test_a_missing_buffer_is_refused_each_time(model):
    ema = EmaModel(model, 0.5)
    change(model)
    before, kept = values(ema), model.norm.running_var
    model.norm.running_var = None
    for _ in range(2):
        with pytest.raises(ValueError, match=r"buffers; they differ in .*running_var"):
            ema.update()
    assert all(torch.equal(v, before[n]) for n, v in values(ema).items()) and ema.num_updates == 0
    model.norm.running_var = kept
    ema.update()
    assert ema.num_updates == 1


def test_an_update_that_fails_half_way_says_what_was_written(model, monkeypatch):
    ema = EmaModel(model, 0.5)
    change(model)
    real, calls = sys.modules["fastvlp.nn.ema_model"].ema, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("no room")
        return real(*args, **kwargs)

    mean, weight = ema.module.norm.running_mean.clone(), ema.module.first.weight.clone()
    monkeypatch.setattr(sys.modules["fastvlp.nn.ema_model"], "ema", failing)
    message = "written for its parameters .*, not for its buffers of floating dtype: no room"
    with pytest.raises(RuntimeError, match=message):
        ema.update()
    assert ema.num_updates == 0 and torch.equal(ema.module.norm.running_mean, mean)
    assert not torch.equal(ema.module.first.weight, weight)
