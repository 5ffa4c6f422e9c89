"""Training with the loss over ranks: the weights that one process with the full batch gets."""

import pytest
import torch
import torch.distributed as dist
from fastvlp_tests import gloo_ranks
from fastvlp_tests.tolerance import assert_as_accurate, epsilon
from fastvlp_tests.two_towers import batch, contrastive, gradients, towers
from torch.nn.parallel import DistributedDataParallel

STEPS, ROWS = 2, 12
OWN = (slice(0, 5), slice(5, None))


def ddp(model):
    return DistributedDataParallel(model)


def fsdp2(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for module in (model.image, model.text, model):
        fully_shard(module, mesh=mesh)
    return model


WRAPPERS = {"ddp": ddp, "fsdp2": fsdp2}
KINDS = [(w, schedule, local) for w in WRAPPERS for schedule, local in
         (("gather", True), ("ring", False))]  # fmt: skip


def train(model, loss, own=slice(None), dtype=torch.float32):
    """Losses of each step, and gradients and weights after the last one."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        images, texts = batch(ROWS, step, dtype)
        value = loss(*model(images[own], texts[own]))
        value.backward()
        optimizer.step()
        losses.append(value.detach())
    weights = {}
    for name, parameter in model.named_parameters():
        whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        weights[name.removeprefix("module.")] = whole.detach()
    return torch.stack(losses), gradients(model), weights


def every_kind(rank):
    from fastvlp.losses import ClipLoss

    found = {}
    for wrapper, schedule, local in KINDS:
        model = WRAPPERS[wrapper](towers(dtype=torch.float32, scalar=False))
        loss = ClipLoss(local, True, rank=rank, world_size=2, schedule=schedule)
        losses, *rest = train(model, loss, OWN[rank])
        if local:  # this rank's share; the others see the mean already
            dist.all_reduce(losses)
            losses /= 2
        found[wrapper, schedule, local] = losses, *rest
    return found


@pytest.fixture(scope="module")
def ranks():
    found = gloo_ranks.run(2, every_kind)
    assert all(isinstance(results, dict) for results in found), found
    return found


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_two_ranks_train_as_one_process_does(ranks, kind):
    eager = train(towers(dtype=torch.float32, scalar=False), contrastive)
    wide = towers(dtype=torch.float32, scalar=False).double()
    exact = train(wide, contrastive, dtype=torch.float64)
    for results in ranks:
        losses, *named = results[kind]
        floor = epsilon(torch.float32) * exact[0].norm().item()
        assert_as_accurate("losses", losses, eager[0], exact[0], floor)
        for ours, plain, wanted in zip(named, eager[1:], exact[1:], strict=True):
            assert ours.keys() == wanted.keys()
            for name, value in wanted.items():
                floor = epsilon(torch.float32) * value.norm().item()
                assert_as_accurate(name, ours[name], plain[name], value, floor)
