"""ema of tensors that an earlier call was given: no more is done than moving them.

Known is what lies where an earlier call's tensors of the same shape lay, those of another test
too: each test has shapes of its own.
"""

import importlib
import math

import pytest
import torch

from fastvlp.ops import ema, ema_reference


@pytest.fixture
def checks(monkeypatch):
    """How often lists were looked at, tensor by tensor."""
    seen = []
    module = importlib.import_module("fastvlp.ops.ema.multi_tensor")
    plain = module.check_lists
    monkeypatch.setattr(
        module, "check_lists", lambda *given, **how: (seen.append(1), plain(*given, **how))
    )
    return seen


@pytest.mark.parametrize("copies", [False, True])
def test_tensors_that_were_moved_before_are_not_looked_at_again(checks, copies):
    momentum, source = [torch.zeros(5, 43), torch.ones(47)], [torch.ones(5, 43), torch.zeros(47)]
    low = [t.bfloat16() for t in momentum] if copies else None
    once = [t.clone() for t in momentum]
    for decay in (0.75, 0.5, 0.0):
        versions = [t._version for t in (*momentum, *(low or ()))]
        ema(momentum, source, decay, low)
        ema_reference(once, source, decay)
        assert all(torch.equal(*pair) for pair in zip(momentum, once, strict=True))
        assert not copies or all(
            torch.equal(copy, m.bfloat16()) for copy, m in zip(low, momentum, strict=True)
        )
        after = [t._version for t in (*momentum, *(low or ()))]
        assert all(new > old for old, new in zip(versions, after, strict=True))
    assert len(checks) == 1


def test_tensors_that_changed_since_are_looked_at(checks):
    momentum, source = torch.zeros(41), torch.ones(41)
    ema([momentum], [source], 0.5)
    source.data = torch.ones(41, dtype=torch.float64)
    ema([momentum], [source], 0.5)
    assert len(checks) == 2 and (momentum == 0.75).all()
    source.data = torch.ones(3)
    with pytest.raises(ValueError, match=r"source\[0\]: expected the shape"):
        ema([momentum], [source], 0.5)
    source.data = torch.ones(41)
    for wrong in (1.5, math.nan, "0.5"):
        with pytest.raises((TypeError, ValueError), match="decay: expected"):
            ema([momentum], [source], wrong)
    with pytest.raises(ValueError, match="source: expected 1 tensors"):
        ema([momentum], [], 0.5)
    assert (momentum == 0.75).all()


def test_an_instruction_set_that_is_not_there_is_refused(monkeypatch, checks):
    momentum, source = torch.zeros(31), torch.ones(31)
    ema([momentum], [source], 0.5)
    monkeypatch.setenv("FASTVLP_CPU_ISA", "mmx")
    with pytest.raises(RuntimeError, match="FASTVLP_CPU_ISA: expected one of .*got 'mmx'"):
        ema([momentum], [source], 0.5)
    assert len(checks) == 1 and (momentum == 0.5).all()


def test_nothing_is_differentiable_when_grad_mode_is_on(checks):
    momentum, source = torch.zeros(37), torch.nn.Parameter(torch.ones(37))
    for _ in range(2):
        ema([momentum], [source], 0.5)
    assert len(checks) == 1 and (momentum == 0.75).all()
    assert not momentum.requires_grad and momentum.grad_fn is None
    (source * momentum).sum().backward()
    assert torch.equal(source.grad, momentum)
