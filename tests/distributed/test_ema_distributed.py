"""Momentum of sharded modules: every rank updates its shards, and a NaN on one stops all."""

import copy
import math

import torch
from fastvlp_tests import gloo_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from fastvlp import EmaModel
from fastvlp.ops import ema
from fastvlp.optim import AdamWEma


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 3))


def sharded(rank):
    mesh = init_device_mesh("cpu", (2,))
    model, momentum = (fully_shard(network(), mesh=mesh) for _ in range(2))
    average = EmaModel(model, 0.5, module=momentum)
    optimizer = AdamWEma(model.parameters(), lr=0.1, ema=average)
    where = [p.to_local().data_ptr() for p in momentum.parameters()]
    for p in model.parameters():
        p.grad = distribute_tensor(torch.ones(p.shape), mesh, p.placements)
    optimizer.step()
    average.update()
    assert where == [p.to_local().data_ptr() for p in momentum.parameters()]
    full = [[p.full_tensor().detach() for p in m.parameters()] for m in (model, momentum)]

    before = [p.full_tensor().clone() for p in momentum.parameters()]
    if rank == 1:
        with torch.no_grad():
            next(model.parameters()).to_local().fill_(math.nan)
    try:
        average.update(check_finite=True)
        said = "nothing"
    except FloatingPointError as error:
        said = str(error)
    untouched = all(map(torch.equal, before, [p.full_tensor() for p in momentum.parameters()]))

    a, b = (distribute_tensor(torch.ones(4, 4), mesh, [p]) for p in (Shard(0), Replicate()))
    errors = []
    for other in (b, torch.ones(4, 4)):
        try:
            ema([a], [other], 0.5)
        except (TypeError, ValueError) as error:
            errors.append(f"{type(error).__name__}: {error}")
    return full, said, untouched, errors


def test_fsdp2_shards():
    plain = network()
    average = EmaModel(copy.deepcopy(plain), 0.5)
    optimizer = AdamWEma(average.model.parameters(), lr=0.1, ema=average)
    for p in average.model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    average.update()
    expected = [[p.detach() for p in m.parameters()] for m in (average.model, average.module)]
    for result in gloo_ranks.run(2, sharded):
        assert not isinstance(result, str), result
        full, said, untouched, errors = result
        for ours, wanted in zip(full, expected, strict=True):
            assert all(map(torch.equal, ours, wanted))
        assert untouched and "0.weight: expected finite values" in said
        assert "source[0]: expected the mesh and placements of momentum[0]" in errors[0]
        assert errors[1].startswith("TypeError: source[0]: expected a DTensor as momentum[0]")
